"""What makes a step faster or smaller without changing what it computes, applied to a model from outside."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mobillama.errors import UsageError
from mobillama.model.linear import Linear, Products
from mobillama.model.transformer import Decoder, Layer, MobiLlama

_ATEN = torch.ops.aten
# What selective activation checkpointing keeps: what took products to compute, and the sums that stand between them.
_KEPT = {
    _ATEN.mm.default,
    _ATEN._scaled_mm.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN.add.Tensor,
}


def checkpoint_activations(decoder: Decoder, mode: Literal["none", "selective", "full"]) -> None:
    """Let each layer keep less for its backward pass and compute the rest again.

    ``selective`` keeps the results of products, attention and sums; ``full`` keeps a layer's input alone.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _selective)
    for layer in decoder.layers:
        layer.forward = functools.partial(checkpoint, Layer.forward.__get__(layer), **options)


def _selective(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    is_kept = operator in _KEPT or str(operator) == "mobillama.rotate.default"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(decoder: Decoder) -> None:
    """Compile a layer once for all layers, and the final norm: seconds, where the model as a whole takes a minute."""
    for module in (*decoder.layers, decoder.norm):
        module.forward = torch.compile(module.forward)


def use_float8(model: MobiLlama) -> None:
    """Multiply the layers' matrices in float8 (torchao: a dynamic scale for each tensor; the head stays as it is).

    Inputs and weights are e4m3, gradients e5m2; sums and results are as wide as before.

    Raises:
        UsageError: torchao is not installed.
    """
    products = _float8_products()
    for module in model.model.modules():
        if isinstance(module, Linear):
            module.products = products


def _float8_products() -> Products:
    try:
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig
    except ImportError:
        raise UsageError("train.float8: torchao is not installed; pip install 'mobillama[float8]'") from None
    # (emulate, fast accumulation, …) of the three products: only the forward one sums fast, as torchao's own recipe.
    kinds = LinearMMConfig(*(ScaledMMConfig(False, fast, False, False) for fast in (True, False, False)))
    role, e4m3, e5m2 = GemmInputRole, torch.float8_e4m3fn, torch.float8_e5m2

    def cast(x: Tensor, dtype: torch.dtype, as_role: Any) -> Tensor:
        return hp_tensor_to_float8_dynamic(x, dtype, kinds, gemm_input_role=as_role)

    def output(x_ni: Tensor, weight_oi: Tensor) -> Tensor:
        return torch.mm(cast(x_ni, e4m3, role.INPUT), cast(weight_oi.t(), e4m3, role.WEIGHT))

    def input_gradient(grad_no: Tensor, weight_oi: Tensor) -> Tensor:
        return torch.mm(cast(grad_no, e5m2, role.GRAD_OUTPUT), cast(weight_oi.t(), e4m3, role.WEIGHT).t())

    def weight_gradient(grad_no: Tensor, x_ni: Tensor) -> Tensor:
        return torch.mm(cast(grad_no, e5m2, role.GRAD_OUTPUT).t(), cast(x_ni, e4m3, role.INPUT))

    return Products(output, input_gradient, weight_gradient)
