"""What a model is worth: its features against labels, and against those of its teacher."""
