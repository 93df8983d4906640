"""A layer's training step as one function, applied to a model from outside: the fastest way, with the least kept.

In bfloat16 SwiGLU and the residual sums are in the products' epilogues. The backward pass makes a norm's output and
SwiGLU's again from their inputs, so that they need not be kept. A layer keeps its input, the rotated
heads, attention's output, the stream after attention, and gates with their factors: 6 h + 2 i numbers of a token.

A weight that several layers use is cast once a pass, and the products of its gradients add up in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobillama.model.heads import split_heads
from mobillama.model.linear import to_compute_type
from mobillama.model.transformer import Decoder, FeedForward, Layer
from mobillama.recipe import ModelConfig
from mobillama.train.arithmetic import Arithmetic, Bfloat16, Float8, Operand
from mobillama.train.hopper import Rotation, attention, attention_backward


def fuse_layers(decoder: Decoder, float8: bool = False, recompute: bool = False) -> None:
    """Let each layer compute its training step by :class:`_FusedLayer`; without gradients it stays as it was.

    Args:
        decoder: the layers' owner.
        float8: multiply in float8, with one scale for each tensor.
        recompute: keep a layer's input alone and compute the rest again for the backward pass.

    Raises:
        ValueError: the model has QK-norm, or later, a pass with gradients brings positions, a mask or a cache.
    """
    if decoder.shape.qk_norm:
        raise ValueError("fused layers know no QK-norm")
    arithmetic = Float8() if float8 else Bfloat16()
    uses = Counter(decoder.layers[layer] for layer, _ in decoder.layer_weights)
    uses.update(decoder.ffns[ffn] for _, ffn in decoder.layer_weights)
    opened: dict[nn.Module, tuple[_Joined, ...]] = {}

    def begin(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = positional[4] if len(positional) > 4 else named.get("position_ids")
        if given is not None and torch.is_grad_enabled():
            raise ValueError("fused layers know no positions but 0, 1, 2 …")
        opened.clear()

    decoder.register_forward_pre_hook(begin, with_kwargs=True)
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


class _Order(NamedTuple):
    """In which order joined weights stand: the row of the weights one after another that each row comes from, and back."""

    source_o: Tensor
    place_o: Tensor


@functools.cache
def _halves_in_turn(rows: tuple[int, int, int], head_dim: int, device: torch.device) -> _Order:
    """Queries', keys' and values' rows; in a head of the first two, row k comes before row k + d/2, then k + 1."""
    turned, total = rows[0] + rows[1], sum(rows)
    heads_hdx = torch.arange(turned).view(-1, 2, head_dim // 2)
    return _order(torch.cat([heads_hdx.transpose(1, 2).flatten(), torch.arange(turned, total)]), device)


@functools.cache
def _rows_in_turn(rows: int, device: torch.device) -> _Order:
    """The first rows of two weights, then the second ones, and so on."""
    return _order(torch.arange(2 * rows).view(2, rows).T.flatten(), device)


def _order(source_o: Tensor, device: torch.device) -> _Order:
    return _Order(source_o.to(device), source_o.argsort().to(device))


class _Gradient:
    """The gradient of weights that were joined, (o, i), adding up in float32 over all uses."""

    def __init__(self, rows: list[int], order: _Order | None) -> None:
        self.total: Tensor | None = None
        self.rows, self.order = rows, order


class _Join(torch.autograd.Function):
    """Hands out joined weights in the compute type, and when all that used them has run backward, their gradients."""

    @staticmethod
    def forward(ctx: Any, gradient: _Gradient, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        joined_oi = weights[0].new_empty((sum(gradient.rows), weights[0].shape[1]), dtype=dtype)
        for part_oi, weight_oi in zip(torch.split(joined_oi, gradient.rows), weights, strict=True):
            part_oi.copy_(weight_oi)
        return joined_oi if gradient.order is None else joined_oi.index_select(0, gradient.order.source_o)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        total_oi, ctx.gradient.total = ctx.gradient.total, None
        if ctx.gradient.order is not None:
            total_oi = total_oi.index_select(0, ctx.gradient.order.place_o)
        return None, None, *torch.split(total_oi, ctx.gradient.rows)


class _Joined(NamedTuple):
    """Weights (…, i) on one input as one matrix: for autograd, for products, and what gathers its gradient.

    The last does not refer to the first: Python would free such a circle late.
    """

    value: Tensor
    operand: Operand
    gradient: _Gradient


def _join(arithmetic: Arithmetic, dtype: torch.dtype, *weights: Tensor, order: _Order | None = None) -> _Joined:
    gradient = _Gradient([len(weight) for weight in weights], order)
    function: Any = _Join
    value_oi = function.apply(gradient, dtype, *weights)
    return _Joined(value_oi, arithmetic.weight(value_oi.detach()), gradient)


@dataclass(frozen=True)
class _Facts:
    """What a layer's step knows beside tensors that need a gradient."""

    arithmetic: Arithmetic
    gradients: tuple[_Gradient, ...]
    operands: tuple[Operand, ...]
    rotation: Rotation
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
        qkv = own.q_proj.weight, own.k_proj.weight, own.v_proj.weight
        rows = len(qkv[0]), len(qkv[1]), len(qkv[2])
        order = _halves_in_turn(rows, own.head_dim, x_btc.device) if arithmetic.in_turn else None
        return join(*qkv, order=order), join(own.o_proj.weight)

    def join_ffn() -> tuple[_Joined, ...]:
        gate, up = ffn.gate_proj.weight, ffn.up_proj.weight
        order = _rows_in_turn(len(gate), x_btc.device) if arithmetic.in_turn else None
        return join(gate, up, order=order), join(ffn.down_proj.weight)

    joined = (*open_weights(layer, join_attention), *open_weights(ffn, join_ffn))
    values, operands, gradients = zip(*joined, strict=True)
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    heads = own.q_proj.out_features // own.head_dim
    rotation = Rotation(*rotary, heads, own.head_dim, config.rope_theta, arithmetic.in_turn)
    facts = _Facts(arithmetic, gradients, operands, rotation, config.rms_norm_eps)
    function: Any = _FusedLayer
    return function.apply(facts, x_btc, *norms, *values)


class _FusedLayer(torch.autograd.Function):
    """x + attention(norm(x)), then that + swiglu(norm(that)).

    Shapes: n = b · t tokens · c channels · j all heads' channels, or gates and factors · k gated channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        facts: _Facts,
        x_btc: Tensor,
        norm1_c: Tensor,
        norm2_c: Tensor,
        *_: Tensor,
    ) -> Tensor:
        multiply, (qkv, o, gate_up, down), rotation = facts.arithmetic, facts.operands, facts.rotation
        x_nc = x_btc.flatten(0, 1)
        y, factor1_n, most1 = multiply.normalised(x_nc, norm1_c, facts.eps)
        heads_btj = multiply.rotated_product(y, qkv, rotation).view(*x_btc.shape[:2], -1)
        del y
        seen_bthd, rest = attention(*split_heads(heads_btj, rotation.heads, rotation.head_dim))
        seen_nc = seen_bthd.flatten(0, 1).flatten(1)
        most_seen = multiply.largest(seen_nc)
        middle_nc = multiply.product_plus(multiply.rows(seen_nc, most_seen), o, x_nc)
        y, factor2_n, most2 = multiply.normalised(middle_nc, norm2_c, facts.eps)
        gate_up_nj, gated, most_gated = multiply.gated_product(y, gate_up)
        del y
        out_nc = multiply.product_plus(gated, down, middle_nc)
        ctx.facts = dataclasses.replace(facts, operands=())
        ctx.operands = [len(operand) for operand in facts.operands]
        ctx.save_for_backward(
            x_nc, factor1_n, most1, heads_btj, seen_bthd, most_seen, middle_nc, factor2_n, most2, gate_up_nj, most_gated,
            norm1_c, norm2_c, *chain(*facts.operands), *rest,
        )  # fmt: skip
        return torch.ops.aten._unsafe_view(out_nc, x_btc.shape)  # no view: FSDP warns of modules that return one

    @staticmethod
    def backward(ctx: Any, grad_btc: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_nc, factor1_n, most1, heads_btj, seen_bthd, most_seen, middle_nc, factor2_n, most2, gate_up_nj, most_gated,
            norm1_c, norm2_c, *others,
        ) = ctx.saved_tensors  # fmt: skip
        facts: _Facts = ctx.facts
        multiply, (of_qkv, of_o, of_gate_up, of_down) = facts.arithmetic, facts.gradients
        rotation, widths = facts.rotation, (facts.rotation.heads, facts.rotation.head_dim)
        tensors = iter(others)
        qkv, o, gate_up, down = (tuple(islice(tensors, count)) for count in ctx.operands)
        rest = tuple(tensors)
        grad_nc = grad_btc.flatten(0, 1).contiguous()

        grad = multiply.gradient(grad_nc)
        grad_nj, parts, gated = multiply.gated_backward(grad, down, gate_up_nj, most_gated)
        of_down.total = multiply.weight_gradient(of_down.total, grad, gated)
        del gate_up_nj, gated
        grad = multiply.gradient(grad_nj, parts)
        del grad_nj
        grad_nc, y, grad_norm2_c, parts = multiply.normalised_backward(
            middle_nc, factor2_n, norm2_c, most2, multiply.input_gradient(grad, gate_up), grad_nc
        )
        of_gate_up.total = multiply.weight_gradient(of_gate_up.total, grad, y)
        del y

        grad = multiply.gradient(grad_nc, parts)
        seen = multiply.columns(seen_bthd.flatten(0, 1).flatten(1), most_seen)
        of_o.total = multiply.weight_gradient(of_o.total, grad, seen)
        del seen
        grad_btj = torch.empty_like(heads_btj)
        attention_backward(
            multiply.input_gradient(grad, o).view_as(seen_bthd),
            split_heads(heads_btj, *widths),
            seen_bthd,
            rest,
            split_heads(grad_btj, *widths),
        )
        grad = multiply.rotated_backward(grad_btj.flatten(0, 1), rotation)
        grad_nc, y, grad_norm1_c, _ = multiply.normalised_backward(
            x_nc, factor1_n, norm1_c, most1, multiply.input_gradient(grad, qkv), grad_nc
        )
        of_qkv.total = multiply.weight_gradient(of_qkv.total, grad, y)
        return None, grad_nc.view_as(grad_btc), grad_norm1_c, grad_norm2_c, None, None, None, None
