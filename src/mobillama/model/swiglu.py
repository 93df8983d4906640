"""SwiGLU's elementwise part: silu(gate) · up, gate and up lying side by side."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """Map (…, 2 i), gate before up, to silu(gate) · up (…, i)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(gate_up_nj: Tensor, grad_ni: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient for ``gate_up`` (n, 2 i) and :func:`swiglu` of it again (n, i).

    On a GPU one kernel (:mod:`mobillama.model.kernels`) reads each number once and writes both; a compiler makes several
    of it, since they have different shapes, and reads most numbers twice.
    """
    if gate_up_nj.is_cuda:
        gradient, output = torch.ops.mobillama.swiglu_backward(gate_up_nj, grad_ni)
        return gradient, output
    gate, up = gate_up_nj.chunk(2, dim=-1)
    silu = F.silu(gate)
    return torch.cat((torch.ops.aten.silu_backward(grad_ni * up, gate), grad_ni * silu), dim=-1), silu * up
