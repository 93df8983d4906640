"""A fused layer computes the gradients of the plain one; on the CPU the kernels' formulas stand in for them."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from mobillama.model.loss import linear_cross_entropy
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig
from mobillama.train.fused import fuse_layers

CONFIG = ModelConfig(61, 48, 72, 4, 6, 2, max_position_embeddings=32)


def gradients(
    config: ModelConfig, fused: bool, recompute: bool = False, float8: bool = False, passes: int = 1
) -> dict[str, torch.Tensor]:
    model = MobiLlama(config).to(torch.float32 if float8 else torch.float64)
    initialise(model, config, 0)
    if fused:
        fuse_layers(model.model, float8, recompute)
    for number in range(passes):
        ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(number))
        total, _ = linear_cross_entropy(model.model(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
        total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(("share", "groups"), [("ffn", 1), ("ffn", 2), ("none", 1), ("block", 1)])
def test_gradients_are_the_plain_ones(share, groups, recompute):
    config = dataclasses.replace(CONFIG, share=share, ffn_groups=groups)
    expected = gradients(config, fused=False, passes=2)
    found = gradients(config, fused=True, recompute=recompute, passes=2)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_float8_gradients_are_near(recompute):
    """An e4m3 number has 4 significant bits, an e5m2 number 3."""
    expected, found = gradients(CONFIG, fused=False), gradients(CONFIG, True, recompute, float8=True)
    for name, gradient in found.items():
        error = float((gradient - expected[name]).norm() / expected[name].norm())
        assert 1e-3 < error < 0.15, (name, error)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed again"])
def test_it_keeps_six_streams_and_the_gates_of_a_layer(recompute):
    model = MobiLlama(CONFIG)
    fuse_layers(model.model, recompute=recompute)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(torch.zeros(2, 16, dtype=torch.long))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens, layers = 2 * 16, CONFIG.num_hidden_layers
    heads = CONFIG.hidden_size * (1 + 2 * CONFIG.key_value_heads / CONFIG.num_attention_heads)
    of_layer = CONFIG.hidden_size if recompute else 3 * CONFIG.hidden_size + heads + 2 * CONFIG.intermediate_size
    numbers = sum(size for place, size in kept.items() if place not in parameters) / 4
    weights = 0 if recompute else sum(p.numel() for p in model.model.layers.parameters())
    weights += 0 if recompute else sum(p.numel() for p in model.model.ffns.parameters())
    assert numbers <= 1.05 * (layers * tokens * of_layer + weights) + tokens * 300


def test_nothing_waits_for_the_garbage_collector():
    """A tensor in a cycle of references lives until Python looks for cycles: gigabytes, at full size."""
    model = MobiLlama(CONFIG)
    fuse_layers(model.model)
    gc.collect()
    gc.disable()
    try:
        model.model(torch.zeros(2, 16, dtype=torch.long)).sum().backward()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [found.shape for found in gc.garbage if isinstance(found, torch.Tensor)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_without_gradients_layers_stay_as_they_were():
    model = MobiLlama(CONFIG)
    initialise(model, CONFIG, 0)
    ids = torch.randint(0, 61, (2, 16))
    with torch.no_grad():
        expected = model(ids)
        fuse_layers(model.model)
        assert torch.equal(model(ids), expected)
