"""RMSNorm over a residual stream of any type."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight multiplies in its own precision, whatever the type of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, c) to (…, c) in x's type."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return (F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight).to(x.dtype)


def normalise(x_nc: Tensor, weight_c: Tensor, eps: float, output: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return the RMSNorm of ``x`` in its type, each row's factor 1/RMS (n), and its largest magnitudes part by part.

    Factors and magnitudes are in the weight's precision. Without ``output`` the first is empty.
    """
    if x_nc.is_cuda:
        from mobillama.model import kernels

        return kernels.normalise(x_nc, weight_c, eps, output)
    wide_nc = x_nc.to(weight_c.dtype)
    factor_n = torch.rsqrt(wide_nc.square().mean(1) + eps)
    y_nc = wide_nc * factor_n[:, None] * weight_c
    return y_nc.to(x_nc.dtype) if output else x_nc.new_empty(0), factor_n, y_nc.abs().amax(1)


def normalise_backward(
    x_nc: Tensor, factor_n: Tensor, weight_c: Tensor, grad_y_nc: Tensor, grad_x_nc: Tensor, output: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`normalise`'s gradient for ``x`` added to ``grad_x``, its output again, its gradient for the weight, and
    the first's largest magnitudes part by part.

    The output costs one write here, where ``x`` is at hand, and need not be kept since the forward pass. Without ``output``
    it is empty.
    """
    if x_nc.is_cuda:
        from mobillama.model import kernels

        return kernels.normalise_backward(x_nc, factor_n, weight_c, grad_y_nc, grad_x_nc, output)
    scaled_nc = x_nc.to(weight_c.dtype) * factor_n[:, None]
    grad_nc = grad_y_nc.to(weight_c.dtype)
    weighted_nc = grad_nc * weight_c
    inward_nc = weighted_nc - scaled_nc * (weighted_nc * scaled_nc).mean(1, keepdim=True)
    total_nc = inward_nc * factor_n[:, None] + grad_x_nc.to(weight_c.dtype)
    y_nc = (scaled_nc * weight_c).to(x_nc.dtype) if output else x_nc.new_empty(0)
    return total_nc.to(x_nc.dtype), y_nc, (grad_nc * scaled_nc).sum(0), total_nc.abs().amax(1)
