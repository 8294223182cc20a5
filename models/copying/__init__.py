"""A student that runs with the attention of a frozen teacher: in training, and as a model of its own."""
