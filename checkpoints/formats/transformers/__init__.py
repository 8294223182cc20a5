"""Key maps of the vision towers of Hugging Face transformers."""
