"""Looking inside a model: its attention over images, its rollout, its numbers by layer; as pictures and a page."""
