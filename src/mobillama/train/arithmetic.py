"""The number formats in which fused layers multiply: bfloat16, and float8 with one scale for each tensor.

Both offer the same products. A tensor's largest magnitude gives its scale; kernels that make a tensor report it part by part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mobillama.model.linear import add_weight_gradient
from mobillama.train.hopper import Rotation, gated_product, gated_product_backward, product_plus, rotated_product

Operand = tuple[Tensor, ...]


class Bfloat16:
    """Products in the type that the tensors have.

    In the rows of joined weights, gates take turns with factors, and a rotated head's first half with its second.
    """

    in_turn = True

    def largest(self, x: Tensor, parts: Tensor | None = None) -> Tensor:
        """Return nothing: no scale is needed."""
        return x.new_empty(0)

    def operand(self, weight_oi: Tensor) -> Operand:
        """Return a weight as the products take it."""
        return (weight_oi,)

    def rotated_product(self, x_ni: Tensor, largest: Tensor, weight: Operand, rotation: Rotation) -> Tensor:
        """Return all heads' channels ``x @ weight.T`` (n, j), queries and keys rotated."""
        return rotated_product(x_ni, weight[0], rotation)

    def product_plus(self, x_ni: Tensor, largest: Tensor, weight: Operand, residual_no: Tensor) -> Tensor:
        """Return ``x @ weight.T + residual`` (n, o)."""
        return product_plus(x_ni, weight[0], residual_no)

    def gated_product(self, x_ni: Tensor, largest: Tensor, weight: Operand) -> tuple[Tensor, Tensor, Tensor]:
        """Return gates and factors (n, 2 k), silu(gate) · factor (n, k), and the latter's largest magnitude."""
        gate_up_nj, gated_nk = gated_product(x_ni, weight[0])
        return gate_up_nj, gated_nk, self.largest(gated_nk)

    def gradient(self, grad_no: Tensor, parts: Tensor | None = None) -> Operand:
        """Return an output's gradient as the products take it."""
        return (grad_no,)

    def gated_backward(
        self, grad: Operand, weight: Operand, gate_up_nj: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradient for gates and factors, its largest magnitudes part by part, and silu(gate) · factor again."""
        grad_nj, gated_nk = gated_product_backward(grad[0], weight[0], gate_up_nj)
        return grad_nj, None, gated_nk

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """Return ``grad @ weight`` (n, i)."""
        return grad[0] @ weight[0]

    def weight_gradient(self, total_oi: Tensor | None, grad: Operand, x_ni: Tensor, largest: Tensor) -> Tensor:
        """Return ``total + grad.T @ x`` (o, i) in float32."""
        return add_weight_gradient(total_oi, grad[0], x_ni)


class Float8:
    """Products of float8 tensors: inputs and weights in e4m3, gradients in e5m2; sums and results are wide.

    The hardware multiplies rows by rows, so that a tensor which two products read by row and by column is kept both ways.
    Only the forward product sums fast, as in torchao's recipe for a scale a tensor.
    """

    in_turn = False

    def largest(self, x: Tensor, parts: Tensor | None = None) -> Tensor:
        """Return the largest magnitude (), from ``parts`` where they are known."""
        return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) if parts is None else parts.amax()

    def operand(self, weight_oi: Tensor) -> Operand:
        """Return a weight as the products take it: by row, by column, and what undoes its scale."""
        return quantise(weight_oi, self.largest(weight_oi), torch.float8_e4m3fn, True, True)

    def product(self, x_ni: Tensor, largest: Tensor, weight: Operand) -> Tensor:
        """Return ``x @ weight.T`` (n, o)."""
        rows_ni, _, inverse = quantise(x_ni, largest, torch.float8_e4m3fn, True, False)
        return _rows_by_rows(rows_ni, inverse, weight[0], weight[2], x_ni.dtype, fast=True)

    def rotated_product(self, x_ni: Tensor, largest: Tensor, weight: Operand, rotation: Rotation) -> Tensor:
        """Return all heads' channels ``x @ weight.T`` (n, j), queries and keys rotated."""
        heads_nj = self.product(x_ni, largest, weight)
        rotation.apply(heads_nj)
        return heads_nj

    def product_plus(self, x_ni: Tensor, largest: Tensor, weight: Operand, residual_no: Tensor) -> Tensor:
        """Return ``x @ weight.T + residual`` (n, o)."""
        return self.product(x_ni, largest, weight).add_(residual_no)

    def gated_product(self, x_ni: Tensor, largest: Tensor, weight: Operand) -> tuple[Tensor, Tensor, Tensor]:
        """Return gates and factors (n, 2 k), silu(gate) · factor (n, k), and the latter's largest magnitude."""
        gate_up_nj = self.product(x_ni, largest, weight)
        if x_ni.is_cuda:
            from mobillama.model import kernels

            gated_nk, parts = kernels.swiglu(gate_up_nj)
            return gate_up_nj, gated_nk, parts.amax()
        gate_nk, up_nk = gate_up_nj.chunk(2, dim=1)
        gated_nk = F.silu(gate_nk) * up_nk
        return gate_up_nj, gated_nk, self.largest(gated_nk)

    def gradient(self, grad_no: Tensor, parts: Tensor | None = None) -> Operand:
        """Return an output's gradient as the products take it: by row, by column, and what undoes its scale."""
        return quantise(grad_no, self.largest(grad_no, parts), torch.float8_e5m2, True, True)

    def gated_backward(
        self, grad: Operand, weight: Operand, gate_up_nj: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradient for gates and factors, its largest magnitudes part by part, and silu(gate) · factor again."""
        grad_nk = self.input_gradient(grad, weight).to(gate_up_nj.dtype)
        if grad_nk.is_cuda:
            from mobillama.model import kernels

            grad_nj, gated_nk, parts = kernels.swiglu_backward(gate_up_nj, grad_nk)
            return grad_nj, parts, gated_nk
        gate_nk, up_nk = gate_up_nj.chunk(2, dim=1)
        silu_nk = F.silu(gate_nk)
        grads = torch.ops.aten.silu_backward(grad_nk * up_nk, gate_nk), grad_nk * silu_nk
        return torch.cat(grads, dim=1), None, silu_nk * up_nk

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """Return ``grad @ weight`` (n, i)."""
        return _rows_by_rows(grad[0], grad[2], weight[1], weight[2], torch.bfloat16, fast=False)

    def weight_gradient(self, total_oi: Tensor | None, grad: Operand, x_ni: Tensor, largest: Tensor) -> Tensor:
        """Return ``total + grad.T @ x`` (o, i) in float32."""
        _, columns_in, inverse = quantise(x_ni, largest, torch.float8_e4m3fn, False, True)
        product_oi = _rows_by_rows(grad[1], grad[2], columns_in, inverse, torch.float32, fast=False)
        return product_oi if total_oi is None else total_oi.add_(product_oi)


Arithmetic = Bfloat16 | Float8


def quantise(x_ni: Tensor, largest: Tensor, dtype: torch.dtype, by_row: bool, by_column: bool) -> Operand:
    """Return ``x`` in float8 by row (n, i), by column (i, n), each empty if not asked for, and what undoes the scale.

    Args:
        x_ni: the tensor.
        largest: its largest magnitude (), which becomes the type's greatest number.
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
        by_row: whether products read its rows.
        by_column: whether products read its columns.
    """
    if x_ni.is_cuda:
        from mobillama.model import kernels

        return kernels.quantise(x_ni, largest, dtype, by_row, by_column)
    most = torch.finfo(dtype).max
    bound = largest.float().clamp(min=1e-12)
    rows_ni = (x_ni.float() * (most / bound)).clamp(-most, most).to(dtype)
    empty = rows_ni.new_empty(0)
    return rows_ni if by_row else empty, rows_ni.T.contiguous() if by_column else empty, bound / most


def _rows_by_rows(
    a_mk: Tensor, a_inverse: Tensor, b_nk: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """Return ``a @ b.T`` (m, n) of two float8 tensors, their scales undone."""
    if a_mk.is_cuda:
        return torch._scaled_mm(
            a_mk, b_nk.T, scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype, use_fast_accum=fast
        )
    return (a_mk.float() @ b_nk.float().T * (a_inverse * b_inverse)).to(dtype)
