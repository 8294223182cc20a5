"""What comes from the Hugging Face hub: downloads that resume, hashes that are checked, errors that say what to do."""
