"""What is checked in a file of weights and in what it says of its model, before anything is allocated or run."""
