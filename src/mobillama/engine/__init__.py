"""Engines: decoding a model token by token behind one small interface."""

TORCH, ONNXRUNTIME = "torch", "onnxruntime"
ENGINES = (TORCH, ONNXRUNTIME)
