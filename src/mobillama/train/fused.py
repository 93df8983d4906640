"""A layer's training step as one function, applied to a model from outside: the fastest way, with the least kept.

In bfloat16 SwiGLU and the residual sums are in the products' epilogues. The backward pass makes a norm's output and
SwiGLU's again where it reads their inputs anyway, so that they need not be kept. A layer keeps its input, the rotated
heads, attention's output, the stream after attention, and gates with their factors: 6 h + 2 i numbers of a token.

A weight that several layers use is cast once a pass, and the products of its gradients add up in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobillama.model.heads import split_heads
from mobillama.model.linear import to_compute_type
from mobillama.model.norm import normalise, normalise_backward
from mobillama.model.rotary import rotate_in_place
from mobillama.model.transformer import Decoder, FeedForward, Layer
from mobillama.recipe import ModelConfig
from mobillama.train.arithmetic import Arithmetic, Bfloat16, Float8, Operand
from mobillama.train.hopper import attention, attention_backward


def fuse_layers(decoder: Decoder, float8: bool = False, recompute: bool = False) -> None:
    """Let each layer compute its training step by :class:`_FusedLayer`; without gradients it stays as it was.

    Args:
        decoder: the layers' owner.
        float8: multiply in float8, with one scale for each tensor.
        recompute: keep a layer's input alone and compute the rest again for the backward pass.

    Raises:
        ValueError: the model has QK-norm, or later, a pass with gradients brings a mask or a cache.
    """
    if decoder.shape.qk_norm:
        raise ValueError("fused layers know no QK-norm")
    arithmetic = Float8() if float8 else Bfloat16()
    uses = Counter(decoder.layers[layer] for layer, _ in decoder.layer_weights)
    uses.update(decoder.ffns[ffn] for _, ffn in decoder.layer_weights)
    opened: dict[nn.Module, tuple[_Joined, ...]] = {}
    decoder.register_forward_pre_hook(lambda *_: opened.clear())
    if not recompute:
        decoder.register_forward_hook(lambda *_: opened.clear())

    def open_weights(module: nn.Module, join: Callable[[], tuple[_Joined, ...]]) -> tuple[_Joined, ...]:
        if uses[module] == 1:
            return join()
        if module not in opened:
            opened[module] = join()
        return opened[module]

    def forward(layer: Layer, plain: Callable[..., Tensor], x_btc: Tensor, ffn: FeedForward, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(x_btc, ffn, *inputs)
        rotary, mask, _, cache, _ = inputs
        if mask is not None or cache is not None:
            raise ValueError("fused layers know no mask but the causal one, and no cache")
        step = functools.partial(_step, decoder.shape, arithmetic, layer, ffn, open_weights)
        if recompute:
            return checkpoint(step, x_btc, rotary, use_reentrant=False, preserve_rng_state=False)
        return step(x_btc, rotary)

    for module in decoder.layers:
        layer = cast(Layer, module)
        layer.forward = functools.partial(forward, layer, layer.forward)  # type: ignore[method-assign]


class _Gradient:
    """The gradient of weights that were joined, (o, i), adding up in float32 over all uses."""

    def __init__(self, rows: list[int], take_turns: bool) -> None:
        self.total: Tensor | None = None
        self._rows, self._take_turns = rows, take_turns

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


class _Joined(NamedTuple):
    """Weights (…, i) on one input as one matrix: for autograd, for products, and what gathers its gradient.

    The last does not refer to the first: Python would free such a circle late.
    """

    value: Tensor
    operand: Operand
    gradient: _Gradient


def _join(arithmetic: Arithmetic, dtype: torch.dtype, *weights: Tensor, take_turns: bool = False) -> _Joined:
    gradient = _Gradient([len(weight) for weight in weights], take_turns)
    function: Any = _Join
    value_oi = function.apply(gradient, dtype, *weights)
    return _Joined(value_oi, arithmetic.operand(value_oi.detach()), gradient)


@dataclass(frozen=True)
class _Facts:
    """What a layer's step knows beside tensors that need a gradient."""

    arithmetic: Arithmetic
    gradients: tuple[_Gradient, ...]
    operands: tuple[Operand, ...]
    heads: int
    head_dim: int
    eps: float


def _step(
    config: ModelConfig,
    arithmetic: Arithmetic,
    layer: Layer,
    ffn: FeedForward,
    open_weights: Callable[..., tuple[_Joined, ...]],
    x_btc: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    own, x_btc = layer.self_attn, to_compute_type(x_btc)
    join = functools.partial(_join, arithmetic, x_btc.dtype)

    def join_attention() -> tuple[_Joined, ...]:
        return join(own.q_proj.weight, own.k_proj.weight, own.v_proj.weight), join(own.o_proj.weight)

    def join_ffn() -> tuple[_Joined, ...]:
        gates = join(ffn.gate_proj.weight, ffn.up_proj.weight, take_turns=arithmetic.gates_take_turns)
        return gates, join(ffn.down_proj.weight)

    joined = (*open_weights(layer, join_attention), *open_weights(ffn, join_ffn))
    values, operands, gradients = zip(*joined, strict=True)
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    heads = own.q_proj.out_features // own.head_dim
    facts = _Facts(arithmetic, gradients, operands, heads, own.head_dim, config.rms_norm_eps)
    function: Any = _FusedLayer
    return function.apply(facts, x_btc, *rotary, *norms, *values)


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
        *_: Tensor,
    ) -> Tensor:
        multiply, (qkv, o, gate_up, down) = facts.arithmetic, facts.operands
        x_nc = x_btc.flatten(0, 1)
        y_nc, factor1_n, parts = normalise(x_nc, norm1_c, facts.eps)
        most1 = multiply.largest(y_nc, parts)
        heads_btj = multiply.product(y_nc, most1, qkv).view(*x_btc.shape[:2], -1)
        del y_nc
        rotate_in_place(heads_btj, cos_btd, sin_btd, facts.heads, facts.head_dim)
        seen_bthd, rest = attention(*split_heads(heads_btj, facts.heads, facts.head_dim))
        seen_nc = seen_bthd.flatten(0, 1).flatten(1)
        most_seen = multiply.largest(seen_nc)
        middle_nc = multiply.product_plus(seen_nc, most_seen, o, x_nc)
        y_nc, factor2_n, parts = normalise(middle_nc, norm2_c, facts.eps)
        most2 = multiply.largest(y_nc, parts)
        gate_up_nj, gated_nk, most_gated = multiply.gated_product(y_nc, most2, gate_up)
        del y_nc
        out_nc = multiply.product_plus(gated_nk, most_gated, down, middle_nc)
        ctx.facts = dataclasses.replace(facts, operands=())
        ctx.operands = [len(operand) for operand in facts.operands]
        ctx.save_for_backward(
            x_nc, factor1_n, most1, heads_btj, seen_bthd, most_seen, middle_nc, factor2_n, most2, gate_up_nj, most_gated,
            cos_btd, sin_btd, norm1_c, norm2_c, *chain(*facts.operands), *rest,
        )  # fmt: skip
        return torch.ops.aten._unsafe_view(out_nc, x_btc.shape)  # no view: FSDP warns of modules that return one

    @staticmethod
    def backward(ctx: Any, grad_btc: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_nc, factor1_n, most1, heads_btj, seen_bthd, most_seen, middle_nc, factor2_n, most2, gate_up_nj, most_gated,
            cos_btd, sin_btd, norm1_c, norm2_c, *others,
        ) = ctx.saved_tensors  # fmt: skip
        facts: _Facts = ctx.facts
        multiply, (of_qkv, of_o, of_gate_up, of_down) = facts.arithmetic, facts.gradients
        tensors = iter(others)
        qkv, o, gate_up, down = (tuple(islice(tensors, count)) for count in ctx.operands)
        rest = tuple(tensors)
        grad_nc = grad_btc.flatten(0, 1).contiguous()

        grad = multiply.gradient(grad_nc)
        grad_nj, parts, gated_nk = multiply.gated_backward(grad, down, gate_up_nj)
        of_down.total = multiply.weight_gradient(of_down.total, grad, gated_nk, most_gated)
        del gate_up_nj, gated_nk
        grad = multiply.gradient(grad_nj, parts)
        del grad_nj
        grad_nc, y_nc, grad_norm2_c, parts = normalise_backward(
            middle_nc, factor2_n, norm2_c, multiply.input_gradient(grad, gate_up), grad_nc
        )
        of_gate_up.total = multiply.weight_gradient(of_gate_up.total, grad, y_nc, most2)
        del y_nc

        grad = multiply.gradient(grad_nc, parts)
        of_o.total = multiply.weight_gradient(of_o.total, grad, seen_bthd.flatten(0, 1).flatten(1), most_seen)
        grad_btj = torch.empty_like(heads_btj)
        attention_backward(
            multiply.input_gradient(grad, o).view_as(seen_bthd),
            split_heads(heads_btj, facts.heads, facts.head_dim),
            seen_bthd,
            rest,
            split_heads(grad_btj, facts.heads, facts.head_dim),
        )
        rotate_in_place(grad_btj, cos_btd, sin_btd, facts.heads, facts.head_dim, back=True)
        grad = multiply.gradient(grad_btj.flatten(0, 1))
        grad_nc, y_nc, grad_norm1_c, _ = normalise_backward(
            x_nc, factor1_n, norm1_c, multiply.input_gradient(grad, qkv), grad_nc
        )
        of_qkv.total = multiply.weight_gradient(of_qkv.total, grad, y_nc, most1)
        return (None, grad_nc.view_as(grad_btc), None, None, grad_norm1_c, grad_norm2_c, None, None, None, None)
