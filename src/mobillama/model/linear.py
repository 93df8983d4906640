"""A matrix whose gradient adds up in the weight's own precision however often it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def to_compute_type(x: Tensor) -> Tensor:
    """Return ``x`` in the type that matrix products compute in: autocast's where it is on, else its own."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class Linear(nn.Linear):
    """``x @ weight.T`` without bias; the weight is cast to the compute type anew at each use.

    A float32 weight that serves 22 layers receives 22 gradients. Cast per use, each is cast back to float32 before
    autograd adds it. Autocast's weight cache, or a bfloat16 parameter, would add them in bfloat16, whose 8 bits lose
    what one layer of 22 contributes.
    """

    def __init__(self, in_features: int, out_features: int, into_residual: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.into_residual = into_residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features) in x's type, or in autocast's where it is on."""
        x = to_compute_type(x)
        return F.linear(x, self.weight.to(x.dtype))
