"""Products with a weight whose gradient adds up in the weight's own precision however often it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.model.swiglu import swiglu, swiglu_backward


def to_compute_type(x: Tensor) -> Tensor:
    """Return ``x`` in the type that matrix products compute in: autocast's where it is on, else its own."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


@dataclass(frozen=True)
class Products:
    """The three matrix products of a weight (o, i) in one precision, on inputs (n, i) and output gradients (n, o)."""

    output: Callable[[Tensor, Tensor], Tensor]
    """(x_ni, weight_oi) → (n, o)."""
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    """(grad_no, weight_oi) → (n, i)."""
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    """(grad_no, x_ni) → (o, i)."""


COMPUTE_TYPE = Products(
    output=lambda x_ni, weight_oi: x_ni @ weight_oi.T,
    input_gradient=lambda grad_no, weight_oi: grad_no @ weight_oi,
    weight_gradient=lambda grad_no, x_ni: grad_no.T @ x_ni,
)


class _Product(torch.autograd.Function):
    """x @ weight.T, or swiglu(x) @ weight.T, whose backward pass recomputes swiglu(x) while it has x at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products, gated: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.gated = products, gated
        x_ni = x.flatten(0, -2)
        return products.output(swiglu(x_ni) if gated else x_ni, weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x, weight), products = ctx.saved_tensors, ctx.products
        grad_no, x_ni = grad.flatten(0, -2), x.flatten(0, -2)
        grad_ni = products.input_gradient(grad_no, weight)
        if ctx.gated:
            grad_ni, x_ni = swiglu_backward(x_ni, grad_ni)
        is_trained = ctx.needs_input_grad[1]  # under an adapter it is not
        return grad_ni.view_as(x), products.weight_gradient(grad_no, x_ni) if is_trained else None, None, None


class Linear(nn.Linear):
    """``x @ weight.T`` without bias; the weight is cast to the compute type anew at each use.

    A float32 weight that serves 22 layers receives 22 gradients. Cast per use, each is cast back to float32 before
    autograd adds it. Autocast's weight cache, or a bfloat16 parameter, would add them in bfloat16, whose 8 bits lose
    what one layer of 22 contributes.
    """

    def __init__(self, in_features: int, out_features: int, into_residual: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.into_residual = into_residual
        self.products = COMPUTE_TYPE

    def forward(self, x: Tensor, gated: bool = False) -> Tensor:
        """Map (…, in_features) to (…, out_features) in x's type, or in autocast's where it is on.

        With ``gated``, x (…, 2·in_features) passes :func:`mobillama.model.swiglu.swiglu` first.
        """
        return _multiply(x, self.weight, self.products, gated)


def multiply_side_by_side(x: Tensor, *linears: nn.Module) -> Tensor:
    """Return the outputs of several matrices on one input, joined (…, sum of out_features).

    In training this is one product, whose gradient for ``x`` is one product too. Joining the weights copies them,
    little beside a training batch but much beside one token, so without gradients the outputs are joined instead; and
    where another library has put adapters around the matrices, which are more than their weights.
    """
    plain = [linear for linear in linears if type(linear) is Linear]
    if not torch.is_grad_enabled() or len(plain) < len(linears):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    return _multiply(x, torch.cat([linear.weight for linear in plain]), plain[0].products, False)


def multiply_gated(x: Tensor, linear: nn.Module) -> Tensor:
    """Return a matrix's output on :func:`mobillama.model.swiglu.swiglu` of an input (…, 2·in_features)."""
    return linear(x, gated=True) if type(linear) is Linear else linear(swiglu(x))


def add_weight_gradient(total_oi: Tensor | None, grad_no: Tensor, x_ni: Tensor) -> Tensor:
    """Return ``total`` + grad.T @ x in float32, or in a wider type of the inputs; on a GPU bfloat16 products add themselves."""
    if not (grad_no.is_cuda and grad_no.dtype == torch.bfloat16):
        product_oi = grad_no.T @ x_ni
        product_oi = product_oi.float() if product_oi.dtype.itemsize < 4 else product_oi
        return product_oi if total_oi is None else total_oi.add_(product_oi)
    if total_oi is None:
        return torch.mm(grad_no.T, x_ni, out_dtype=torch.float32)
    return torch.addmm(total_oi, grad_no.T, x_ni, out_dtype=torch.float32, out=total_oi)


def _multiply(x: Tensor, weight: Tensor, products: Products, gated: bool) -> Tensor:
    x = to_compute_type(x)
    function: Any = _Product
    return function.apply(x, weight.to(x.dtype), products, gated)
