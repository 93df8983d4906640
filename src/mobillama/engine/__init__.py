"""Engines: decoding a model token by token behind one small interface."""

TORCH, ONNXRUNTIME, NATIVE = "torch", "onnxruntime", "native"
ENGINES = (NATIVE, ONNXRUNTIME, TORCH)
