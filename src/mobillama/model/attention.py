"""Causal self-attention with rotary positions, correct for padding, packed documents and a key/value cache.

Shapes: b batch · t query tokens · s key tokens (cached and new) · h heads · d head width · c channels.
"""

from __future__ import annotations

import math
import mmap
from typing import Optional, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobillama.model.heads import split_heads
from mobillama.model.linear import Linear, multiply_side_by_side
from mobillama.model.norm import RMSNorm
from mobillama.model.rotary import rotate, rotated_heads
from mobillama.recipe import ModelConfig


class AttentionCache(Protocol):
    """What attention asks of a key/value cache; transformers' caches and :class:`KVCache` both answer it."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens held."""
        ...

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append new keys and values (b, h, t, d) of a layer; return all (b, h, s, d)."""
        ...


class KVCache:
    """Keys and values of all layers in two tensors allocated once; decoding never re-allocates.

    Args:
        config: the model's shape.
        batch_size: rows.
        max_length: tokens that fit.
        dtype: type of the stored keys and values.
        device: where they are kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.key_value_heads, max_length, config.attention_head_dim)
        self.max_length = max_length
        self._keys_lbhsd = _zeros(shape, dtype, torch.device(device))
        self._values_lbhsd = _zeros(shape, dtype, torch.device(device))
        self._lengths = [0] * config.num_hidden_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens held for a layer."""
        return self._lengths[layer_idx]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append new keys and values (b, h, t, d) of a layer; return views of all (b, h, s, d).

        Raises:
            ValueError: more tokens than ``max_length``.
        """
        start = self._lengths[layer_idx]
        end = start + key_states.shape[2]
        if end > self.max_length:
            raise ValueError(f"key/value cache of {self.max_length} tokens cannot hold {end}")
        self._keys_lbhsd[layer_idx, :, :, start:end] = key_states
        self._values_lbhsd[layer_idx, :, :, start:end] = value_states
        self._lengths[layer_idx] = end
        return self._keys_lbhsd[layer_idx, :, :, :end], self._values_lbhsd[layer_idx, :, :, :end]

    @property
    def nbytes(self) -> int:
        """Bytes of the two tensors."""
        return self._keys_lbhsd.nbytes + self._values_lbhsd.nbytes

    def tensors(self, span: int) -> tuple[Tensor, Tensor]:
        """Return views of the first ``span`` places of keys and values, each (layer, b, h, span, d)."""
        return self._keys_lbhsd[:, :, :, :span], self._values_lbhsd[:, :, :, :span]

    def extend(self, tokens: int) -> None:
        """Count ``tokens`` more as held, which were written through :meth:`tensors`."""
        self._lengths = [held + tokens for held in self._lengths]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on: the kept prefix serves another continuation."""
        self._lengths = [min(length, held) for held in self._lengths]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU they take memory only where they are written, which :func:`torch.zeros` does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def attention_mask(
    queries: int,
    keys: int,
    padding_bs: Optional[Tensor],
    documents_bt: Optional[Tensor],
    device: torch.device,
) -> tuple[Optional[Tensor], bool]:
    """Return the mask (b or 1, 1, t, s; True: may look) and whether the kernel's own causal mask is enough.

    Args:
        queries: number t of new tokens; they are the last t of the keys.
        keys: number s of tokens, cached ones included.
        padding_bs: True where a token is real, False where it is padding; absent: all real.
        documents_bt: document of each token; tokens of different documents do not see each other. Only without cache.

    A padded query sees at least itself, so that no row of the softmax is empty.
    """
    if padding_bs is None and documents_bt is None:
        if queries == keys:
            return None, queries > 1
        if queries == 1:
            return None, False
    key_index = torch.arange(keys, device=device)
    query_index = key_index[keys - queries :]
    mask = (key_index[None, :] <= query_index[:, None])[None]
    if documents_bt is not None:
        mask = mask & (documents_bt[:, :, None] == documents_bt[:, None, :])
    if padding_bs is not None:
        mask = mask & padding_bs[:, None, :]
        mask = mask | (key_index[None, :] == query_index[:, None])
    return mask[:, None], False


class Attention(nn.Module):
    """Multi-head attention without biases, with optional grouped key/value heads, a free head width, and QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.grouped = config.key_value_heads != config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, config.key_value_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, config.key_value_heads * self.head_dim)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        self.qk_norm = config.qk_norm
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size, into_residual=True)

    def forward(
        self,
        x_btc: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Optional[Tensor],
        is_causal: bool,
        cache: Optional[AttentionCache],
        layer: int,
    ) -> Tensor:
        """Return the attention output (b, t, c); ``layer`` is the layer's place in the cache."""
        qkv_btj = multiply_side_by_side(x_btc, self.q_proj, self.k_proj, self.v_proj)
        heads = self.q_proj.out_features // self.head_dim
        if self.qk_norm:
            q_bthd, k_bthd, v_bthd = split_heads(qkv_btj, heads, self.head_dim)
            parts = rotate(self.q_norm(q_bthd), *rotary), rotate(self.k_norm(k_bthd), *rotary), v_bthd
        else:
            parts = rotated_heads(qkv_btj, *rotary, heads, self.head_dim)
        q_bhtd, k_bhsd, v_bhsd = (part_bthd.transpose(1, 2) for part_bthd in parts)
        if cache is not None:
            k_bhsd, v_bhsd = cache.update(k_bhsd, v_bhsd, layer)
        y_bhtd = F.scaled_dot_product_attention(
            q_bhtd, k_bhsd, v_bhsd, attn_mask=mask, is_causal=is_causal, enable_gqa=self.grouped
        )
        return self.o_proj(y_bhtd.transpose(1, 2).flatten(2))
