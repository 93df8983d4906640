"""Triton kernels of training on a GPU (CPU builds of torch lack Triton).

Those that compiled layers use are operators ``mobillama::…``, opaque to torch.compile: what it knows of a Triton kernel
that writes into views makes it copy them. The others serve fused layers, which are not compiled.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobillama.model.heads import split_heads

Parts = tuple[Tensor, Tensor, Tensor]

# Programs that share the rows of a norm's backward pass: two of each multiprocessor of an H100 or H200, which read the next
# rows while they compute. More of them read no faster, and their sums have to be added.
_PROGRAMS = 2 * 132
# Bytes of a row up to which shared memory holds the rows that are read ahead.
_READ_AHEAD = 1 << 15


@triton.jit
def swiglu_gradients(gate, up, grad):  # noqa: ANN201  (Triton compiles it)
    """The gradients for gate and up of silu(gate) · up, and that again."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu, silu * up


@triton.jit
def _swiglu_backward_kernel(gate_up, grad, gradient, output, size, inner: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < size
    left = index // inner * inner + index  # of the gate in rows of 2·inner
    gate = tl.load(gate_up + left, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + left + inner, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    of_gate, of_up, result = swiglu_gradients(gate, up, g)
    tl.store(gradient + left, of_gate, mask=inside)
    tl.store(gradient + left + inner, of_up, mask=inside)
    tl.store(output + index, result, mask=inside)


@torch.library.custom_op("mobillama::swiglu_backward", mutates_args=())
def _swiglu_backward_cuda(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    gradient, output = torch.empty_like(gate_up), torch.empty_like(grad)
    programs = triton.cdiv(grad.numel(), 1024)
    _swiglu_backward_kernel[(programs,)](gate_up, grad, gradient, output, grad.numel(), grad.shape[1], 1024)
    return gradient, output


@_swiglu_backward_cuda.register_fake
def _(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), torch.empty_like(grad)


@triton.jit
def _rotate_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, largest, table_rows, sign,
    q_stride, k_stride, v_stride, q_out_stride, k_out_stride, v_out_stride,
    heads: tl.constexpr, key_heads: tl.constexpr, half: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
    in_turn: tl.constexpr, in_place: tl.constexpr, report: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * tile
    if first < heads:
        source, target, head = q + row * q_stride, q_out + row * q_out_stride, first
    elif first < heads + key_heads:
        source, target, head = k + row * k_stride, k_out + row * k_out_stride, first - heads
    else:
        source, target, head = v + row * v_stride, v_out + row * v_out_stride, first - heads - key_heads
    column = tl.arange(0, width)[None, :]
    inside = column < half
    begin = (head + tl.arange(0, tile)[:, None]) * (2 * half)
    table = (row % table_rows) * half + column
    if in_turn:
        both = tl.arange(0, 2 * width)[None, :]
        pairs = tl.load(source + begin + both, mask=both < 2 * half).to(tl.float32)
        left, right = tl.split(tl.reshape(pairs, (tile, width, 2)))
        c, s = tl.load(cos + table, mask=inside), tl.load(sin + table, mask=inside) * sign
        pairs = tl.reshape(tl.join(left * c - right * s, right * c + left * s), (tile, 2 * width))
        tl.store(target + begin + both, pairs, mask=both < 2 * half)
        return
    index = begin + column
    left = tl.load(source + index, mask=inside, other=0.0)
    right = tl.load(source + index + half, mask=inside, other=0.0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    if first < heads + key_heads:
        c, s = tl.load(cos + table, mask=inside, other=0.0), tl.load(sin + table, mask=inside, other=0.0) * sign
        turned_left, turned_right = left * c - right * s, right * c + left * s
        tl.store(target + index, turned_left, mask=inside)
        tl.store(target + index + half, turned_right, mask=inside)
        if report:
            tl.store(largest + place, tl.max(tl.maximum(tl.abs(turned_left), tl.abs(turned_right))))
    else:
        if not in_place:
            tl.store(target + index, left, mask=inside)
            tl.store(target + index + half, right, mask=inside)
        if report:
            tl.store(largest + place, tl.max(tl.maximum(tl.abs(left), tl.abs(right))))


def _launch(
    sources: Parts,
    targets: Parts,
    cos_btd: Tensor,
    sin_btd: Tensor,
    sign: float,
    in_turn: bool = False,
    report: bool = False,
) -> Tensor:
    """Rotate the first two of three (b, t, h, d) tensors, whose heads lie together, into ``targets``; copy the third.

    In place the third stays as it is, and it is read only for the largest magnitudes part by part, which ``report`` asks
    for; only there may the halves of a head take turns.
    """
    batch, tokens, heads, head_dim = sources[0].shape
    key_heads = sources[1].shape[2]
    tile = min(32, math.gcd(heads, key_heads) & -math.gcd(heads, key_heads))
    in_place = sources is targets
    read = heads + key_heads if in_place and not report else heads + 2 * key_heads
    programs = batch * tokens, read // tile
    largest = cos_btd.new_empty(math.prod(programs) if report else 0)
    _rotate_kernel[programs](
        *sources, *targets, cos_btd, sin_btd, largest, cos_btd.shape[0] * cos_btd.shape[1], sign,
        *(part.flatten(0, 1).stride(0) for part in (*sources, *targets)),
        heads, key_heads, head_dim // 2, tile, triton.next_power_of_2(head_dim // 2), in_turn, in_place, report,
    )  # fmt: skip
    return largest


@torch.library.custom_op("mobillama::rotate", mutates_args=())
def _rotate_cuda(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rotated = _empty_heads(qkv, cos, sin, heads, head_dim)
    _launch(split_heads(qkv.contiguous(), heads, head_dim), rotated, cos, sin, 1.0)
    return q, k, v


@_rotate_cuda.register_fake
def _empty_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> Parts:
    q, k, v = (qkv.new_empty(part.shape) for part in split_heads(qkv, heads, head_dim))
    return q, k, v


@torch.library.custom_op("mobillama::rotate_back", mutates_args=())
def _rotate_back_cuda(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    joined = _empty_joined(q, k, v, cos, sin)
    sources = (q.contiguous(), k.contiguous(), v.contiguous())
    _launch(sources, split_heads(joined, q.shape[2], q.shape[3]), cos, sin, -1.0)
    return joined


@_rotate_back_cuda.register_fake
def _empty_joined(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], (q.shape[2] + 2 * k.shape[2]) * q.shape[3])


def rotate_in_place(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, back: bool, in_turn: bool, report: bool
) -> Tensor:
    """See :func:`mobillama.model.rotary.rotate_in_place`."""
    parts = split_heads(qkv, heads, head_dim)
    return _launch(parts, parts, cos, sin, -1.0 if back else 1.0, in_turn, report)


@triton.jit
def _normalise_kernel(x, weight, y, factor, largest, width, eps, write: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    v = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    f = 1.0 / tl.sqrt(tl.sum(v * v) / width + eps)
    tl.store(factor + row, f)
    result = v * f * tl.load(weight + column, mask=inside, other=0.0)
    if write:
        tl.store(y + row * width + column, result, mask=inside)
    tl.store(largest + row, tl.max(tl.abs(result)))


@triton.jit
def _normalise_backward_kernel(
    x, factor, weight, grad_y, grad_x, total, y, grad_weight, largest, rows, width,
    write: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0)
    of_weight = tl.zeros([block], tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=stages):
        place = (tl.zeros([block], tl.int64) + row) * width + column
        f = tl.load(factor + row)
        scaled = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * f
        grad = tl.load(grad_y + place, mask=inside, other=0.0).to(tl.float32)
        weighted = grad * w
        inward = (weighted - scaled * (tl.sum(weighted * scaled) / width)) * f
        result = inward + tl.load(grad_x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + place, result, mask=inside)
        tl.store(largest + row, tl.max(tl.abs(result)))
        if write:
            tl.store(y + place, scaled * w, mask=inside)
        of_weight += grad * scaled
    tl.store(grad_weight + tl.program_id(0) * width + column, of_weight, mask=inside)


def normalise(x: Tensor, weight: Tensor, eps: float, output: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mobillama.model.norm.normalise`."""
    rows, width = x.shape
    y, factor, largest = x.new_empty(x.shape if output else 0), *x.new_empty(2, rows, dtype=torch.float32)
    _normalise_kernel[(rows,)](x, weight, y, factor, largest, width, eps, output, triton.next_power_of_2(width))
    return y, factor, largest


def normalise_backward(
    x: Tensor, factor: Tensor, weight: Tensor, grad_y: Tensor, grad_x: Tensor, output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mobillama.model.norm.normalise_backward`."""
    rows, width = x.shape
    total, y, largest = torch.empty_like(x), x.new_empty(x.shape if output else 0), torch.empty_like(factor)
    programs, block = min(rows, _PROGRAMS), triton.next_power_of_2(width)
    grad_weight = x.new_empty(programs, width, dtype=torch.float32)
    stages = 3 if block * x.element_size() <= _READ_AHEAD else 1
    _normalise_backward_kernel[(programs,)](
        x, factor, weight, grad_y, grad_x, total, y, grad_weight, largest, rows, width, output, block, stages,
        num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return total, y, grad_weight.sum(0), largest
