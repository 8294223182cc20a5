"""Publish to the Hugging Face hub: a student's folder, its model card, its license."""
