"""A copy of the data set on a node's own disk, made once a node."""
