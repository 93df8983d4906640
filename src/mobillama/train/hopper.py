"""What a layer's training step is made of on a Hopper GPU: products with their surroundings fused in, and attention.

quack-kernels and flash-attn-4 compute them there. On a CPU the same functions are plain formulas, which say what the
kernels compute and with which :mod:`mobillama.train.fused` is tested.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mobillama.errors import UsageError
from mobillama.model.rotary import rotate_in_place
from mobillama.recipe import ModelConfig


def require_hopper(device: torch.device, precision: str, config: ModelConfig, context: int, float8: bool) -> None:
    """Check that fused layers of a model can train on ``device``, on sequences of ``context`` tokens.

    Raises:
        UsageError: it is no Hopper GPU, precision or shape do not fit, or the libraries are not installed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise UsageError("train.fused: needs a Hopper GPU (H100, H200); set it to false")
    check_shapes(precision, config, context, float8)
    _libraries()


def check_shapes(precision: str, config: ModelConfig, context: int, float8: bool) -> None:
    """Check that the kernels know precision and shape: rows of 16 bytes, heads that attention knows.

    Raises:
        UsageError: they do not.
    """
    if precision != "bfloat16":
        raise UsageError(f"train.fused: computes in bfloat16, not in {precision}; set train.precision or train.fused")
    unit = 16 if float8 else 8
    sizes = {"model.hidden_size": config.hidden_size, "model.intermediate_size": config.intermediate_size}
    for key, size in sizes.items():
        if size % unit:
            raise UsageError(
                f"train.fused: needs {key} to be a multiple of {unit}, not {size}; set train.fused to false"
            )
    width = config.attention_head_dim
    if width % 8 or not 16 <= width <= 256:
        raise UsageError(f"train.fused: knows no heads {width} wide; set it to false")
    if float8 and context % 16:
        raise UsageError(
            f"train.float8: needs sequences of a multiple of 16 tokens, and these have {context}; prepare the data with "
            "another sequence_length, or set it to false"
        )


@functools.cache
def _libraries() -> tuple[Any, Any, Any, Any]:
    try:
        from flash_attn.cute import interface
        from quack import gemm_interface
        from quack.epilogue import rotary
        from quack.gemm_config import GemmConfig
    except ImportError as error:
        raise UsageError(f"train.fused: {error}; pip install 'mobillama[hopper]'") from None
    _pad_heads(interface)
    return gemm_interface, GemmConfig, interface, rotary


def _pad_heads(interface: Any) -> None:
    """Let flash-attn-4's backward pass round widths of heads as its surroundings do: to 32 (their pull request 2896).

    4.0.0b36 rounds to 16 inside, and its gradients are wrong between multiples of 32. What it compiled so and keeps on
    disk is not used.
    """

    class Backward(interface.FlashAttentionBackwardSm90):  # type: ignore[misc]
        tile_hdim: int
        tile_hdimv: int

        def __init__(self, dtype: Any, width: int, value_width: int | None = None, *args: Any, **named: Any) -> None:
            super().__init__(dtype, width, value_width, *args, **named)
            self.tile_hdim, self.tile_hdimv = (-(-tile // 32) * 32 for tile in (self.tile_hdim, self.tile_hdimv))
            self.check_hdim_oob = self.tile_hdim != width
            self.check_hdim_v_oob = self.tile_hdimv != (value_width or width)

    interface.FlashAttentionBackwardSm90 = Backward
    interface._flash_attn_bwd.compile_cache = interface.get_jit_cache("bwd_padded")


@functools.cache
def _tiles(rows: int, columns: int, pingpong: bool, cluster: tuple[int, int] = (2, 1)) -> Any:
    """Return one choice of tiles, fixed: a choice by timing would let the next process round otherwise."""
    return _libraries()[1](
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=cluster[0],
        cluster_n=cluster[1],
        is_dynamic_persistent=False,
        device_capacity=9,
    )


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are turned, which one product gives (b, t, j) before the values."""

    cos_btd: Tensor
    sin_btd: Tensor
    heads: int
    head_dim: int
    theta: float
    in_turn: bool
    """Whether the halves of a head take turns."""

    def apply(self, heads_nj: Tensor, back: bool = False, report: bool = False) -> Tensor:
        """Rotate where they lie, or with ``back``, the gradients the other way; see :func:`rotate_in_place`."""
        heads_btj = heads_nj.view(-1, self.cos_btd.shape[1], heads_nj.shape[1])
        facts = self.heads, self.head_dim, back, self.in_turn, report
        return rotate_in_place(heads_btj, self.cos_btd, self.sin_btd, *facts)


def rotated_product(x_ni: Tensor, weight_ji: Tensor, rotation: Rotation) -> Tensor:
    """Return all heads' channels ``x @ weight.T`` (n, j), rotated by positions 0, 1, 2 … of each sequence."""
    if x_ni.is_cuda:
        sizes = len(x_ni), rotation.cos_btd.shape[1], len(weight_ji), rotation.heads
        positions_n, frequencies_j = _angles(*sizes, rotation.head_dim, rotation.theta, x_ni.device)
        epilogue, config = _libraries()[3].rope_posfreq_epi, _tiles(192, 128, True)
        return epilogue(x_ni, weight_ji.T, pos=positions_n, freq=frequencies_j, config=config)["D"]
    heads_nj = x_ni @ weight_ji.T
    rotation.apply(heads_nj)
    return heads_nj


@functools.lru_cache(maxsize=4)
def _angles(
    rows: int, tokens: int, columns: int, heads: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each row's position, and what each column turns by a position, as quack's epilogue takes it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    values = (columns // head_dim - heads) // 2 * head_dim
    positions_t = torch.arange(tokens, dtype=torch.float32, device=device)
    frequencies_j = _libraries()[3].make_interleaved_inv_freq(1.0 / theta**exponents, columns - values, values)
    return positions_t.repeat(rows // tokens), frequencies_j.float()


def gated_product(x_ni: Tensor, weight_ji: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x @ weight.T`` (n, j), in which gates and their factors take turns, and silu(gate) · factor (n, j/2)."""
    if x_ni.is_cuda:
        gate_up_nj, gated_nk = _libraries()[0].gemm_act(
            x_ni, weight_ji.T, activation="swiglu", config=_tiles(128, 256, False)
        )
        return gate_up_nj, gated_nk
    gate_up_nj = x_ni @ weight_ji.T
    return gate_up_nj, F.silu(gate_up_nj[:, 0::2]) * gate_up_nj[:, 1::2]


def gated_product_backward(grad_no: Tensor, weight_ok: Tensor, gate_up_nj: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient for ``gate_up`` (n, j) of ``gated @ weight.T``, and ``gated`` (n, k) again."""
    if grad_no.is_cuda:
        grad_nj, gated_nk = _libraries()[0].gemm_dact(
            grad_no,
            weight_ok,
            gate_up_nj,
            activation="swiglu",
            dynamic_scheduler=False,
            config=_tiles(128, 128, True, (1, 2)),
        )
        return grad_nj, gated_nk
    gate_nk, up_nk = gate_up_nj[:, 0::2], gate_up_nj[:, 1::2]
    grad_nk, silu_nk = grad_no @ weight_ok, F.silu(gate_nk)
    parts = torch.ops.aten.silu_backward(grad_nk * up_nk, gate_nk), grad_nk * silu_nk
    return torch.stack(parts, dim=2).flatten(1), silu_nk * up_nk


def product_plus(x_ni: Tensor, weight_oi: Tensor, residual_no: Tensor) -> Tensor:
    """Return ``x @ weight.T + residual``, rounded once."""
    if x_ni.is_cuda:
        _, total_no = _libraries()[0].gemm_act(
            x_ni, weight_oi.T, C=residual_no, store_preact=False, config=_tiles(128, 192, True)
        )
        return total_no
    return x_ni @ weight_oi.T + residual_no


def attention(q_bthd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return causal attention's output (b, t, h, d), and what its backward pass needs beside inputs and output."""
    if not q_bthd.is_cuda:
        return _plain_attention(q_bthd, k_bshd, v_bshd).contiguous(), ()
    found = _libraries()[2]._flash_attn_fwd(q_bthd, k_bshd, v_bshd, causal=True, return_lse=True)
    return found[0], (found[1],)


def attention_backward(
    grad_bthd: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    y_bthd: Tensor,
    rest: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of :func:`attention`'s three inputs into tensors of their shapes."""
    if grad_bthd.is_cuda:
        dq_bthd, dk_bshd, dv_bshd = gradients
        deterministic = torch.are_deterministic_algorithms_enabled()
        _libraries()[2]._flash_attn_bwd(
            *inputs,
            y_bthd,
            grad_bthd,
            *rest,
            causal=True,
            deterministic=deterministic,
            dq=dq_bthd,
            dk=dk_bshd,
            dv=dv_bshd,
        )
        return
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in inputs]
        found = torch.autograd.grad(_plain_attention(*leaves), leaves, grad_bthd)
    for gradient, value in zip(gradients, found, strict=True):
        gradient.copy_(value)


def _plain_attention(q_bthd: Tensor, k_bshd: Tensor, v_bshd: Tensor) -> Tensor:
    q_bhtd, k_bhsd, v_bhsd = (part.transpose(1, 2) for part in (q_bthd, k_bshd, v_bshd))
    return F.scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhsd, is_causal=True, enable_gqa=True).transpose(1, 2)
