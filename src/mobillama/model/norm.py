"""RMSNorm over a residual stream of any type."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight multiplies in its own precision, whatever the type of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, c) to (…, c) in x's type."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return (F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight).to(x.dtype)
