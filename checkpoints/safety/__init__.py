"""What is checked in a file of weights before anything of it is allocated or run."""
