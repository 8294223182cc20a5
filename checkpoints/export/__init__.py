"""Export models as graphs that other runtimes run: ONNX and torch.export."""
