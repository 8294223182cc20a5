"""The loop that trains: building a run, stepping, logging, saving, resuming."""
