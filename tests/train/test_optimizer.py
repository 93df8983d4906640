from __future__ import annotations

import itertools

import pytest
import torch

from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig, OptimizerConfig
from mobillama.train.optimizer import build_optimizer, learning_rate


def test_schedule_warms_up_from_the_first_step_and_ends_at_the_minimum():
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 104) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[53] == pytest.approx(0.55)
    assert rates[103] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


@pytest.mark.parametrize("decay_all", [False, True])
def test_norms_and_embeddings_decay_only_when_asked(decay_all):
    model = MobiLlama(ModelConfig(31, 16, 24, 2, 2))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1, decay_all=decay_all))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    free = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    norms = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert free == (set() if decay_all else norms | {"model.embed_tokens.weight"})


def test_update_equals_adamw_written_out():
    """One step by the formulas of Loshchilov and Hutter (2019), algorithm 2, with decoupled decay scaled by the rate."""
    model = MobiLlama(ModelConfig(31, 16, 24, 1, 2))
    weight = model.lm_head.weight
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    before, gradient = weight.detach().double(), torch.randn_like(weight)
    weight.grad = gradient.clone()
    optimizer.step()
    g = gradient.double()
    moment, square = (0.1 * g) / (1 - 0.9), (0.05 * g * g) / (1 - 0.95)
    expected = before * (1 - 0.01 * 0.1) - 0.01 * moment / (square.sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-7, rtol=1e-5)
