"""The model: tensors, sharing, loss and cost. Knows no files, no devices' setup and no recipe but its own shape."""
