"""What tests of Triton kernels share."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(operator, *inputs):
    """Run an operator where its kernel runs, and bring the result back."""
    moved = (value.detach().to(DEVICE) if isinstance(value, torch.Tensor) else value for value in inputs)
    result = operator(*moved)
    return result.cpu() if isinstance(result, torch.Tensor) else [part.cpu() for part in result]
