"""Latency, memory and multiply-adds of operators and of models, against fused softmax attention."""
