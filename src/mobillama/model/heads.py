"""The heads that one product gives: queries, keys and values side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def split_heads(qkv_btj: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of the queries (b, t, h, d) of ``heads`` heads, the keys and the values in ``qkv``."""
    qkv_bthd = qkv_btj.view(*qkv_btj.shape[:2], -1, head_dim)
    key_heads = (qkv_bthd.shape[2] - heads) // 2
    q_bthd, k_bthd, v_bthd = torch.split(qkv_bthd, [heads, key_heads, key_heads], dim=2)
    return q_bthd, k_bthd, v_bthd
