"""Rotary position embedding (RoFormer, section 3.2.2) of the heads that one product gave.

Shapes: b batch · t tokens · h heads · d head width · j all heads' channels, queries before keys before values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mobillama.model.heads import split_heads


def rotary_tables(position_ids_bt: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return float32 cos and sin, each (b, t, d/2), of the rotary angles at given positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_bt.device) / head_dim
    angles_bth = position_ids_bt[:, :, None].float() * (1.0 / theta**exponents)
    return angles_bth.cos(), angles_bth.sin()


def rotate(x_bthd: Tensor, cos_btd: Tensor, sin_btd: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of a head by its position's angle: Llama's half-rotation layout."""
    cos, sin = cos_btd[:, :, None].to(x_bthd.dtype), sin_btd[:, :, None].to(x_bthd.dtype)
    first, second = x_bthd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotated_heads(
    qkv_btj: Tensor, cos_btd: Tensor, sin_btd: Tensor, heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries (b, t, h, d) of ``heads`` heads, rotated keys, and values.

    On a GPU one kernel (:mod:`mobillama.model.kernels`) reads each number once, and another joins the three gradients;
    a compiler's own kernels read most numbers twice.
    """
    if qkv_btj.is_cuda:
        function: Any = _RotatedHeads
        q_bthd, k_bthd, v_bthd = function.apply(qkv_btj, cos_btd, sin_btd, heads, head_dim)
    else:
        q_bthd, k_bthd, v_bthd = split_heads(qkv_btj, heads, head_dim)
        q_bthd, k_bthd = rotate(q_bthd, cos_btd, sin_btd), rotate(k_bthd, cos_btd, sin_btd)
    return q_bthd, k_bthd, v_bthd


def rotate_in_place(
    qkv_btj: Tensor,
    cos_btd: Tensor,
    sin_btd: Tensor,
    heads: int,
    head_dim: int,
    back: bool = False,
    in_turn: bool = False,
    report: bool = False,
) -> Tensor:
    """Rotate queries and keys where they lie in ``qkv``; with ``back``, their gradients by the opposite angles.

    With ``in_turn`` the halves of a head take turns: it rotates the pairs (2 i, 2 i + 1). Returned are, part by part, the
    largest magnitudes that then lie there, the values' among them, if ``report`` asks for them; else nothing.

    Raises:
        ValueError: both ``in_turn`` and ``report``, which no kernel does.
    """
    if in_turn and report:
        raise ValueError("heads whose halves take turns report no magnitudes")
    if qkv_btj.is_cuda:
        from mobillama.model import kernels

        return kernels.rotate_in_place(qkv_btj, cos_btd, sin_btd, heads, head_dim, back, in_turn, report)
    for part_bthd in split_heads(qkv_btj, heads, head_dim)[:2]:
        halves_bthd = (
            part_bthd.reshape(*part_bthd.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2) if in_turn else part_bthd
        )
        rotated_bthd = rotate(halves_bthd, cos_btd, -sin_btd if back else sin_btd)
        if in_turn:
            rotated_bthd = rotated_bthd.view(*part_bthd.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)
        part_bthd.copy_(rotated_bthd)
    return qkv_btj.abs().amax(-1) if report else qkv_btj.new_empty(0)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_btj: Tensor, cos_btd: Tensor, sin_btd: Tensor, heads: int, head_dim: int) -> Any:
        ctx.save_for_backward(cos_btd, sin_btd)
        return torch.ops.mobillama.rotate(qkv_btj, cos_btd, sin_btd, heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return torch.ops.mobillama.rotate_back(*gradients, *ctx.saved_tensors), None, None, None, None
