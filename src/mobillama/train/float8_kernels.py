"""Triton kernels that make float8 operands on a GPU: see :class:`mobillama.train.arithmetic.Float8`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobillama.model.kernels import swiglu_gradients

Operand = tuple[Tensor, Tensor, Tensor]
"""A tensor in float8 by row and by column, each empty if not asked for, and what undoes the scale."""


@triton.jit
def _swiglu_kernel(gate_up, output, largest, size, inner: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < size
    left = index // inner * inner + index  # of the gate in rows of 2·inner
    gate = tl.load(gate_up + left, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + left + inner, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(output + index, result, mask=inside)
    tl.store(largest + tl.program_id(0), tl.max(tl.abs(result)))


def swiglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return silu(gate) · up (n, i) of ``gate_up`` (n, 2 i), gate before up, and its largest magnitudes part by part."""
    output = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    programs = triton.cdiv(output.numel(), 1024)
    largest = gate_up.new_empty(programs, dtype=torch.float32)
    _swiglu_kernel[(programs,)](gate_up, output, largest, output.numel(), output.shape[1], 1024)
    return output, largest


@triton.jit
def _bound(largest):
    """The magnitude that becomes a type's greatest number."""
    return tl.maximum(tl.load(largest), 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_float8(v, bound, most, dtype: tl.constexpr):
    v = tl.maximum(v * (most / bound), -most, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, most, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def _quantise_kernel(
    x, largest, factor, weight, rows_out, columns_out, inverse, rows, width, most,
    norm: tl.constexpr, write_rows: tl.constexpr, write_columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    bound = _bound(largest)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(inverse, bound / most)
    v = tl.load(x + row64[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if norm:
        f = tl.load(factor + row, mask=row < rows, other=0.0)
        v = v * f[:, None] * tl.load(weight + column, mask=column < width, other=0.0)[None, :]
    v = _to_float8(v, bound, most, rows_out.dtype.element_ty)
    if write_rows:
        tl.store(rows_out + row64[:, None] * width + column[None, :], v, mask=inside)
    if write_columns:
        tl.store(columns_out + column64[:, None] * rows + row[None, :], tl.trans(v), mask=tl.trans(inside))


def quantise(
    x: Tensor,
    largest: Tensor,
    dtype: torch.dtype,
    by_row: bool,
    by_column: bool,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Operand:
    """See :func:`mobillama.train.arithmetic.quantise`.

    Raises:
        ValueError: ``x`` is not bfloat16. From float32, ptxas (CUDA 12.8) miscompiles this kernel: it reads packed pairs of
            float8 numbers before it has written them.
    """
    if x.dtype != torch.bfloat16:
        raise ValueError(f"float8 is made of bfloat16, not of {x.dtype}")
    rows, width = x.shape
    rows_out = x.new_empty(x.shape if by_row else 0, dtype=dtype)
    columns_out = x.new_empty((width, rows) if by_column else 0, dtype=dtype)
    inverse, tile = x.new_empty((), dtype=torch.float32), 64
    _quantise_kernel[(triton.cdiv(rows, tile), triton.cdiv(width, tile))](
        x, largest, *(norm or (x, x)), rows_out, columns_out, inverse, rows, width, torch.finfo(dtype).max,
        norm is not None, by_row, by_column, tile,
    )  # fmt: skip
    return rows_out, columns_out, inverse


@triton.jit
def _swiglu_backward_by_column_kernel(
    gate_up, grad, largest_output, gradient, largest, output_columns, inverse, rows, inner, most, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)
    inside = (row[:, None] < rows) & (column[None, :] < inner)
    left = row64[:, None] * (2 * inner) + column[None, :]  # of the gate in rows of 2·inner
    gate = tl.load(gate_up + left, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + left + inner, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row64[:, None] * inner + column[None, :], mask=inside, other=0.0).to(tl.float32)
    of_gate, of_up, output = swiglu_gradients(gate, up, g)
    tl.store(gradient + left, of_gate, mask=inside)
    tl.store(gradient + left + inner, of_up, mask=inside)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + place, tl.max(tl.maximum(tl.abs(of_gate), tl.abs(of_up))))
    bound = _bound(largest_output)
    if place == 0:
        tl.store(inverse, bound / most)
    output = _to_float8(output, bound, most, output_columns.dtype.element_ty)
    tl.store(output_columns + column64[:, None] * rows + row[None, :], tl.trans(output), mask=tl.trans(inside))


def swiglu_backward_by_column(gate_up: Tensor, grad: Tensor, largest_output: Tensor) -> tuple[Tensor, Tensor, Operand]:
    """See :func:`mobillama.train.arithmetic.swiglu_backward_by_column`.

    The gradient is not rounded to float8 here too, by row and by column, because ptxas makes the same mistake there.
    """
    (rows, inner), tile = grad.shape, 64
    programs = triton.cdiv(rows, tile), triton.cdiv(inner, tile)
    gradient, largest = torch.empty_like(gate_up), grad.new_empty(math.prod(programs), dtype=torch.float32)
    columns = grad.new_empty((inner, rows), dtype=torch.float8_e4m3fn)
    inverse = grad.new_empty((), dtype=torch.float32)
    _swiglu_backward_by_column_kernel[programs](
        gate_up, grad, largest_output, gradient, largest, columns, inverse, rows, inner,
        torch.finfo(columns.dtype).max, tile, num_warps=8,
    )  # fmt: skip
    return gradient, largest, (columns.new_empty(0), columns, inverse)
