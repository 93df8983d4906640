"""A layer's training step as one function, applied to a model from outside: the fastest way, with the least kept.

Nothing that costs one pass over memory stands alone: SwiGLU and the residual sums are in the products' epilogues, and the
backward pass makes a norm's output and SwiGLU's again where it reads their inputs anyway, so that they need not be kept. A
layer keeps, in the compute type, its input, the rotated heads, attention's output, the stream after attention, and gates
with their factors: 6 h + 2 i numbers of a token.

A weight that several layers use is cast once a pass, and the products of its gradients add up in float32.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobillama.errors import UsageError
from mobillama.model.linear import add_weight_gradient, to_compute_type
from mobillama.model.norm import normalise, normalise_backward
from mobillama.model.rotary import rotate_in_place, split_heads
from mobillama.model.transformer import Decoder, FeedForward, Layer
from mobillama.recipe import ModelConfig
from mobillama.train.hopper import (
    attention,
    attention_backward,
    gated_product,
    gated_product_backward,
    product_plus,
)


def fuse_layers(decoder: Decoder, recompute: bool = False) -> None:
    """Let each layer compute its training step by :class:`_FusedLayer`; without gradients it stays as it was.

    Args:
        decoder: the layers' owner.
        recompute: keep a layer's input alone and compute the rest again for the backward pass.

    Raises:
        UsageError: the model has QK-norm.
    """
    if decoder.shape.qk_norm:
        raise UsageError("train.fused: knows no model.qk_norm; set one of them to false")
    uses = Counter(decoder.layers[layer] for layer, _ in decoder.layer_weights)
    uses.update(decoder.ffns[ffn] for _, ffn in decoder.layer_weights)
    opened: dict[nn.Module, tuple[_Joined, ...]] = {}
    decoder.register_forward_pre_hook(lambda *_: opened.clear())

    def open_weights(module: nn.Module, join: Callable[[], tuple[_Joined, ...]]) -> tuple[_Joined, ...]:
        if uses[module] == 1:
            return join()
        if module not in opened:
            opened[module] = join()
        return opened[module]

    def forward(layer: Layer, plain: Callable[..., Tensor], x_btc: Tensor, ffn: FeedForward, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(x_btc, ffn, *inputs)
        step = functools.partial(_step, decoder.shape, layer, ffn, open_weights)
        if recompute:
            return checkpoint(step, x_btc, inputs[0], use_reentrant=False, preserve_rng_state=False)
        return step(x_btc, inputs[0])

    for module in decoder.layers:
        layer = cast(Layer, module)
        layer.forward = functools.partial(forward, layer, layer.forward)  # type: ignore[method-assign]


class _Gradient:
    """The gradient of weights that were joined, (o, i), adding up in float32 over all uses."""

    def __init__(self, rows: list[int], take_turns: bool) -> None:
        self.total: Tensor | None = None
        self._rows, self._take_turns = rows, take_turns

    def add(self, grad_no: Tensor, x_ni: Tensor) -> None:
        """Add the gradient of ``x @ joined.T``."""
        self.total = add_weight_gradient(self.total, grad_no, x_ni)

    def parts(self, joined_oi: Tensor) -> Sequence[Tensor]:
        """Return the weights' places in a joined tensor: one after another, or row by row in turn."""
        if self._take_turns:
            return joined_oi.view(-1, len(self._rows), joined_oi.shape[1]).unbind(1)
        return torch.split(joined_oi, self._rows)


class _Join(torch.autograd.Function):
    """Hands out joined weights in the compute type, and when all that used them has run backward, their gradients."""

    @staticmethod
    def forward(ctx: Any, gradient: _Gradient, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        joined_oi = weights[0].new_empty((sum(map(len, weights)), weights[0].shape[1]), dtype=dtype)
        for part, weight in zip(gradient.parts(joined_oi), weights, strict=True):
            part.copy_(weight)
        return joined_oi

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        total, ctx.gradient.total = ctx.gradient.total, None
        return (None, None, *ctx.gradient.parts(total))


_Joined = tuple[Tensor, _Gradient]


def _join(dtype: torch.dtype, *weights: Tensor, take_turns: bool = False) -> _Joined:
    """Return weights (…, i) on one input as one matrix, and what gathers its gradient (the two must not refer to each other:
    Python would free them late).
    """
    gradient = _Gradient([len(weight) for weight in weights], take_turns)
    function: Any = _Join
    return function.apply(gradient, dtype, *weights), gradient


@dataclass(frozen=True)
class _Facts:
    """What a layer's step knows beside tensors."""

    gradients: tuple[_Gradient, ...]
    heads: int
    head_dim: int
    eps: float


def _step(
    config: ModelConfig,
    layer: Layer,
    ffn: FeedForward,
    open_weights: Callable[..., tuple[_Joined, ...]],
    x_btc: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    own, x_btc = layer.self_attn, to_compute_type(x_btc)
    dtype = x_btc.dtype

    def join_attention() -> tuple[_Joined, ...]:
        heads = own.q_proj.weight, own.k_proj.weight, own.v_proj.weight
        return _join(dtype, *heads), _join(dtype, own.o_proj.weight)

    def join_ffn() -> tuple[_Joined, ...]:
        gates = ffn.gate_proj.weight, ffn.up_proj.weight
        return _join(dtype, *gates, take_turns=True), _join(dtype, ffn.down_proj.weight)

    weights, gradients = zip(*open_weights(layer, join_attention), *open_weights(ffn, join_ffn), strict=True)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    facts = _Facts(gradients, own.q_proj.out_features // own.head_dim, own.head_dim, config.rms_norm_eps)
    function: Any = _FusedLayer
    return function.apply(facts, x_btc, *rotary, *(norm.weight for norm in norms), *weights)


class _FusedLayer(torch.autograd.Function):
    """x + attention(norm(x)), then that + swiglu(norm(that)).

    Shapes: n = b · t tokens · c channels · j all heads' channels, or gates and factors · k gated channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        facts: _Facts,
        x_btc: Tensor,
        cos_btd: Tensor,
        sin_btd: Tensor,
        norm1_c: Tensor,
        norm2_c: Tensor,
        qkv_jc: Tensor,
        o_cc: Tensor,
        gate_up_jc: Tensor,
        down_ck: Tensor,
    ) -> Tensor:
        x_nc = x_btc.flatten(0, 1)
        y_nc, factor1_n = normalise(x_nc, norm1_c, facts.eps)
        heads_btj = (y_nc @ qkv_jc.T).view(*x_btc.shape[:2], -1)
        del y_nc
        rotate_in_place(heads_btj, cos_btd, sin_btd, facts.heads, facts.head_dim)
        seen_bthd, rest = attention(*split_heads(heads_btj, facts.heads, facts.head_dim))
        middle_nc = product_plus(seen_bthd.flatten(0, 1).flatten(1), o_cc, x_nc)
        y_nc, factor2_n = normalise(middle_nc, norm2_c, facts.eps)
        gate_up_nj, gated_nk = gated_product(y_nc, gate_up_jc)
        del y_nc
        out_nc = product_plus(gated_nk, down_ck, middle_nc)
        ctx.facts = facts
        ctx.save_for_backward(
            x_nc, factor1_n, heads_btj, seen_bthd, middle_nc, factor2_n, gate_up_nj,
            cos_btd, sin_btd, norm1_c, norm2_c, qkv_jc, o_cc, gate_up_jc, down_ck, *rest,
        )  # fmt: skip
        return out_nc.view_as(x_btc)

    @staticmethod
    def backward(ctx: Any, grad_btc: Tensor) -> tuple[Tensor | None, ...]:
        facts: _Facts = ctx.facts
        (
            x_nc, factor1_n, heads_btj, seen_bthd, middle_nc, factor2_n, gate_up_nj,
            cos_btd, sin_btd, norm1_c, norm2_c, qkv_jc, o_cc, gate_up_jc, down_ck, *rest,
        ) = ctx.saved_tensors  # fmt: skip
        qkv, o, gate_up, down = facts.gradients
        grad_nc = grad_btc.flatten(0, 1).contiguous()

        grad_nj, gated_nk = gated_product_backward(grad_nc, down_ck, gate_up_nj)
        down.add(grad_nc, gated_nk)
        del gate_up_nj, gated_nk
        grad_nc, y_nc, grad_norm2_c = normalise_backward(middle_nc, factor2_n, norm2_c, grad_nj @ gate_up_jc, grad_nc)
        gate_up.add(grad_nj, y_nc)
        del grad_nj, y_nc

        seen_nc = seen_bthd.flatten(0, 1).flatten(1)
        o.add(grad_nc, seen_nc)
        grad_btj = torch.empty_like(heads_btj)
        attention_backward(
            (grad_nc @ o_cc).view_as(seen_bthd),
            split_heads(heads_btj, facts.heads, facts.head_dim),
            seen_bthd,
            rest,
            split_heads(grad_btj, facts.heads, facts.head_dim),
        )
        rotate_in_place(grad_btj, cos_btd, sin_btd, facts.heads, facts.head_dim, back=True)
        grad_nj = grad_btj.flatten(0, 1)
        grad_nc, y_nc, grad_norm1_c = normalise_backward(x_nc, factor1_n, norm1_c, grad_nj @ qkv_jc, grad_nc)
        qkv.add(grad_nj, y_nc)
        return (None, grad_nc.view_as(grad_btc), None, None, grad_norm1_c, grad_norm2_c, None, None, None, None)
