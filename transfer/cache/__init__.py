"""Teacher targets that are computed once: `transfer.cache`."""
