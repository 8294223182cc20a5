"""Check a file of weights and its description of the model, before anything is allocated or run."""
