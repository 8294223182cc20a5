"""Reports on models: their maps, what operators cost, operators side by side, the demo."""
