"""What makes steps faster or smaller computes the same gradients."""

from __future__ import annotations

import pytest
import torch

from mobillama.model.linear import COMPUTE_TYPE
from mobillama.model.loss import linear_cross_entropy
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig
from mobillama.train.speed import _float8_products, checkpoint_activations, compile_layers, use_float8

CONFIG = ModelConfig(61, 48, 64, 4, 4, max_position_embeddings=32)


def gradients(change=lambda model: None) -> dict[str, torch.Tensor]:
    model = MobiLlama(CONFIG)
    initialise(model, CONFIG, 0)
    change(model)
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    total, _ = linear_cross_entropy(model.model(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_the_same(mode, compiled):
    def change(model: MobiLlama) -> None:
        checkpoint_activations(model.model, mode)
        if compiled:
            compile_layers(model.model)

    expected = gradients()
    found = gradients(change)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_full_checkpointing_keeps_little_for_the_backward_pass():
    def kept(mode: str) -> int:
        model = MobiLlama(CONFIG)
        checkpoint_activations(model.model, mode)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(torch.zeros(2, 16, dtype=torch.long))
        return sum(seen.values())

    assert kept("full") < 0.2 * kept("none")


def test_float8_products_are_near_the_exact_ones():
    """An e4m3 number has 4 significant bits, an e5m2 number 3; the errors of a sum of products partly cancel."""
    float8 = _float8_products()
    x, weight, grad = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16(), torch.randn(64, 32).bfloat16()
    for name, inputs in (("output", (x, weight)), ("input_gradient", (grad, weight)), ("weight_gradient", (grad, x))):
        exact = getattr(COMPUTE_TYPE, name)(*(tensor.double() for tensor in inputs))
        found = getattr(float8, name)(*inputs).double()
        assert found.shape == exact.shape
        assert 1e-3 < float((found - exact).norm() / exact.norm()) < 0.08


def test_float8_takes_the_layers_and_leaves_the_head():
    model = MobiLlama(CONFIG)
    use_float8(model)
    assert model.lm_head.products is COMPUTE_TYPE
    assert model.model.ffns[0].down_proj.products is not COMPUTE_TYPE
    assert model.model.layers[3].self_attn.q_proj.products is model.model.ffns[0].down_proj.products
