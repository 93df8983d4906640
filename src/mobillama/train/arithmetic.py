"""The number formats in which fused layers multiply: bfloat16, and float8 with one scale for each tensor.

Both offer the same products. A tensor's largest magnitude gives its scale; kernels that make a tensor report it part by part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobillama.model.linear import add_weight_gradient
from mobillama.model.norm import normalise, normalise_backward
from mobillama.model.swiglu import swiglu, swiglu_backward
from mobillama.train.hopper import Rotation, gated_product, gated_product_backward, product_plus, rotated_product

Operand = tuple[Tensor, ...]
"""A tensor as products take it: in bfloat16 itself; in float8 by row, by column, each empty if no product reads it so, and
what undoes the scale."""


class Bfloat16:
    """Products in the type that the tensors have.

    In the rows of joined weights, gates take turns with factors, and a rotated head's first half with its second.
    """

    in_turn = True

    def largest(self, x: Tensor) -> Tensor:
        """Return nothing: no scale is needed."""
        return x.new_empty(0)

    def weight(self, weight_oi: Tensor) -> Operand:
        """Return a weight as the products take it."""
        return (weight_oi,)

    def rows(self, x_ni: Tensor, largest: Tensor) -> Operand:
        """Return an input as the output's product takes it."""
        return (x_ni,)

    def columns(self, x_ni: Tensor, largest: Tensor) -> Operand:
        """Return an input as the weight gradient's product takes it."""
        return (x_ni,)

    def gradient(self, grad_no: Tensor, parts: Tensor | None = None) -> Operand:
        """Return an output's gradient as its two products take it."""
        return (grad_no,)

    def normalised(self, x_nc: Tensor, weight_c: Tensor, eps: float) -> tuple[Operand, Tensor, Tensor]:
        """Return the RMSNorm of ``x`` as the output's product takes it, each row's factor (n), and its :meth:`largest`."""
        y_nc, factor_n, _ = normalise(x_nc, weight_c, eps)
        return (y_nc,), factor_n, self.largest(y_nc)

    def normalised_backward(
        self, x_nc: Tensor, factor_n: Tensor, weight_c: Tensor, largest: Tensor, grad_y_nc: Tensor, grad_x_nc: Tensor
    ) -> tuple[Tensor, Operand, Tensor, Tensor]:
        """Return the gradient for ``x`` added to ``grad_x``, the norm's output as the weight gradient's product takes it, the
        gradient for the norm's weight, and the first's largest magnitudes part by part.
        """
        grad_nc, y_nc, grad_weight_c, parts = normalise_backward(x_nc, factor_n, weight_c, grad_y_nc, grad_x_nc)
        return grad_nc, (y_nc,), grad_weight_c, parts

    def rotated_product(self, x: Operand, weight: Operand, rotation: Rotation) -> Tensor:
        """Return all heads' channels ``x @ weight.T`` (n, j), queries and keys rotated."""
        return rotated_product(x[0], weight[0], rotation)

    def rotated_backward(self, grad_nj: Tensor, rotation: Rotation) -> Operand:
        """Return the gradient of what was rotated, given that of the rotated, which is lost."""
        rotation.apply(grad_nj, back=True)
        return (grad_nj,)

    def product_plus(self, x: Operand, weight: Operand, residual_no: Tensor) -> Tensor:
        """Return ``x @ weight.T + residual`` (n, o)."""
        return product_plus(x[0], weight[0], residual_no)

    def gated_product(self, x: Operand, weight: Operand) -> tuple[Tensor, Operand, Tensor]:
        """Return gates and factors (n, 2 k), silu(gate) · factor as a product takes it, and the latter's :meth:`largest`."""
        gate_up_nj, gated_nk = gated_product(x[0], weight[0])
        return gate_up_nj, (gated_nk,), self.largest(gated_nk)

    def gated_backward(
        self, grad: Operand, weight: Operand, gate_up_nj: Tensor, largest: Tensor
    ) -> tuple[Tensor, Tensor | None, Operand]:
        """Return the gradient for gates and factors, its largest magnitudes part by part, and silu(gate) · factor as the
        weight gradient's product takes it; ``largest`` is the latter's magnitude.
        """
        grad_nj, gated_nk = gated_product_backward(grad[0], weight[0], gate_up_nj)
        return grad_nj, None, (gated_nk,)

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """Return ``grad @ weight`` (n, i)."""
        return grad[0] @ weight[0]

    def weight_gradient(self, total_oi: Tensor | None, grad: Operand, x: Operand) -> Tensor:
        """Return ``total + grad.T @ x`` (o, i) in float32."""
        return add_weight_gradient(total_oi, grad[0], x[0])


class Float8:
    """Products of float8 tensors: inputs and weights in e4m3, gradients in e5m2; sums and results are wide.

    The hardware multiplies rows by rows, so that a tensor which two products read by row and by column is kept both ways.
    A norm's output is computed anew where it is rounded, once its largest magnitude is known, which moves less than to
    write it and read it again. Only the forward product sums fast, as in torchao's recipe for a scale a tensor.
    """

    in_turn = False

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest magnitude ()."""
        return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)

    def weight(self, weight_oi: Tensor) -> Operand:
        """Return a weight as the products take it."""
        return quantise(weight_oi, self.largest(weight_oi), torch.float8_e4m3fn, True, True)

    def rows(self, x_ni: Tensor, largest: Tensor) -> Operand:
        """Return an input as the output's product takes it."""
        return quantise(x_ni, largest, torch.float8_e4m3fn, True, False)

    def columns(self, x_ni: Tensor, largest: Tensor) -> Operand:
        """Return an input as the weight gradient's product takes it."""
        return quantise(x_ni, largest, torch.float8_e4m3fn, False, True)

    def gradient(self, grad_no: Tensor, parts: Tensor | None = None) -> Operand:
        """Return an output's gradient as its two products take it; ``parts`` are its largest magnitudes where known."""
        largest = self.largest(grad_no) if parts is None else parts.amax()
        return quantise(grad_no, largest, torch.float8_e5m2, True, True)

    def normalised(self, x_nc: Tensor, weight_c: Tensor, eps: float) -> tuple[Operand, Tensor, Tensor]:
        """Return the RMSNorm of ``x`` as the output's product takes it, each row's factor (n), and its :meth:`largest`."""
        _, factor_n, parts = normalise(x_nc, weight_c, eps, output=False)
        largest = parts.amax()
        return quantise(x_nc, largest, torch.float8_e4m3fn, True, False, (factor_n, weight_c)), factor_n, largest

    def normalised_backward(
        self, x_nc: Tensor, factor_n: Tensor, weight_c: Tensor, largest: Tensor, grad_y_nc: Tensor, grad_x_nc: Tensor
    ) -> tuple[Tensor, Operand, Tensor, Tensor]:
        """Return the gradient for ``x`` added to ``grad_x``, the norm's output as the weight gradient's product takes it, the
        gradient for the norm's weight, and the first's largest magnitudes part by part.
        """
        given = x_nc, factor_n, weight_c, grad_y_nc, grad_x_nc
        grad_nc, _, grad_weight_c, parts = normalise_backward(*given, output=False)
        y = quantise(x_nc, largest, torch.float8_e4m3fn, False, True, (factor_n, weight_c))
        return grad_nc, y, grad_weight_c, parts

    def product(self, x: Operand, weight: Operand) -> Tensor:
        """Return ``x @ weight.T`` (n, o)."""
        return _rows_by_rows(x[0], x[2], weight[0], weight[2], torch.bfloat16, fast=True)

    def rotated_product(self, x: Operand, weight: Operand, rotation: Rotation) -> Tensor:
        """Return all heads' channels ``x @ weight.T`` (n, j), queries and keys rotated."""
        heads_nj = self.product(x, weight)
        rotation.apply(heads_nj)
        return heads_nj

    def rotated_backward(self, grad_nj: Tensor, rotation: Rotation) -> Operand:
        """Return the gradient of what was rotated, given that of the rotated, which is lost."""
        return self.gradient(grad_nj, rotation.apply(grad_nj, back=True, report=True))

    def product_plus(self, x: Operand, weight: Operand, residual_no: Tensor) -> Tensor:
        """Return ``x @ weight.T + residual`` (n, o)."""
        return self.product(x, weight).to(residual_no.dtype).add_(residual_no)

    def gated_product(self, x: Operand, weight: Operand) -> tuple[Tensor, Operand, Tensor]:
        """Return gates and factors (n, 2 k), silu(gate) · factor as a product takes it, and the latter's :meth:`largest`."""
        gate_up_nj = self.product(x, weight)
        if gate_up_nj.is_cuda:
            from mobillama.train import float8_kernels as kernels

            gated_nk, parts = kernels.swiglu(gate_up_nj)
            largest = parts.amax()
        else:
            gated_nk = swiglu(gate_up_nj)
            largest = self.largest(gated_nk)
        return gate_up_nj, self.rows(gated_nk, largest), largest

    def gated_backward(
        self, grad: Operand, weight: Operand, gate_up_nj: Tensor, largest: Tensor
    ) -> tuple[Tensor, Tensor | None, Operand]:
        """Return the gradient for gates and factors, its largest magnitudes part by part, and silu(gate) · factor as the
        weight gradient's product takes it; ``largest`` is the latter's magnitude.
        """
        return swiglu_backward_by_column(gate_up_nj, self.input_gradient(grad, weight), largest)

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """Return ``grad @ weight`` (n, i)."""
        return _rows_by_rows(grad[0], grad[2], weight[1], weight[2], torch.bfloat16, fast=False)

    def weight_gradient(self, total_oi: Tensor | None, grad: Operand, x: Operand) -> Tensor:
        """Return ``total + grad.T @ x`` (o, i) in float32."""
        product_oi = _rows_by_rows(grad[1], grad[2], x[1], x[2], torch.float32, fast=False)
        return product_oi if total_oi is None else total_oi.add_(product_oi)


Arithmetic = Bfloat16 | Float8


def quantise(
    x_ni: Tensor,
    largest: Tensor,
    dtype: torch.dtype,
    by_row: bool,
    by_column: bool,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Operand:
    """Return ``x`` in float8 by row (n, i), by column (i, n), each empty if not asked for, and what undoes the scale.

    Args:
        x_ni: the tensor.
        largest: its largest magnitude (), which becomes the type's greatest number.
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
        by_row: whether products read its rows.
        by_column: whether products read its columns.
        norm: row factors (n) and column factors (i) that ``x`` is multiplied with first.
    """
    if x_ni.is_cuda:
        from mobillama.train import float8_kernels as kernels

        return kernels.quantise(x_ni, largest, dtype, by_row, by_column, norm)
    most = torch.finfo(dtype).max
    bound = largest.float().clamp(min=1e-12)
    wide_ni = x_ni.float() if norm is None else x_ni.float() * norm[0][:, None] * norm[1]
    rows_ni = (wide_ni * (most / bound)).clamp(-most, most).to(dtype)
    empty = rows_ni.new_empty(0)
    return rows_ni if by_row else empty, rows_ni.T.contiguous() if by_column else empty, bound / most


def swiglu_backward_by_column(gate_up_nj: Tensor, grad_nk: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Operand]:
    """Return SwiGLU's gradient for ``gate_up``, its largest magnitudes part by part, and its output again in e4m3 by column.

    Args:
        gate_up_nj: gates before factors (n, 2 k).
        grad_nk: the output's gradient.
        largest: the output's largest magnitude ().
    """
    if grad_nk.is_cuda:
        from mobillama.train import float8_kernels as kernels

        return kernels.swiglu_backward_by_column(gate_up_nj, grad_nk, largest)
    grad_nj, gated_nk = swiglu_backward(gate_up_nj, grad_nk)
    return grad_nj, grad_nj.abs().amax(1), quantise(gated_nk, largest, torch.float8_e4m3fn, False, True)


def _rows_by_rows(
    a_mk: Tensor, a_inverse: Tensor, b_nk: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """Return ``a @ b.T`` (m, n) of two float8 tensors, their scales undone."""
    if a_mk.is_cuda:
        return torch._scaled_mm(
            a_mk, b_nk.T, scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype, use_fast_accum=fast
        )
    return (a_mk.float() @ b_nk.float().T * (a_inverse * b_inverse)).to(dtype)
