"""Making trained models smaller: quantization."""
