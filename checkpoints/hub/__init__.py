"""Files from the Hugging Face hub, at one commit, with errors that say what to do."""
