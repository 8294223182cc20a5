"""A benchmark of attention programs: each is trained from scratch in small models, with and without its convolution."""
