from __future__ import annotations

import itertools

import pytest
import torch

from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig, OptimizerConfig
from mobillama.train.optimizer import build_optimizers, learning_rate


def test_schedule_warms_up_from_the_first_step_and_ends_at_the_minimum():
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(config, step, 104) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[53] == pytest.approx(0.55)
    assert rates[103] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_wsd_stays_at_the_peak_and_falls_in_a_line_to_the_minimum():
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4, schedule="wsd", decay_share=0.25)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:75]) == {1.0}
    assert rates[75:] == pytest.approx([1.0 - 0.9 * n / 25 for n in range(1, 26)])


def test_muon_takes_the_layers_matrices_and_adamw_the_rest():
    model = MobiLlama(ModelConfig(31, 16, 24, 2, 2))
    muon, adamw = build_optimizers(model, OptimizerConfig(kind="muon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = [{names[p] for group in each.param_groups for p in group["params"]} for each in (muon, adamw)]
    assert taken[0] | taken[1] == set(names.values()) and not taken[0] & taken[1]
    assert taken[0] == {name for name in names.values() if "_proj" in name}


def test_muons_update_is_an_orthogonal_matrix_of_adamws_size():
    """Kimi's scaling (arXiv 2502.16982, section 2.2): 0.2 sqrt(max(rows, columns)) times the orthogonalised gradient."""
    model = MobiLlama(ModelConfig(31, 64, 96, 1, 2))
    muon, _ = build_optimizers(model, OptimizerConfig(kind="muon", learning_rate=0.01, weight_decay=0.0))
    weight = model.model.ffns[0].up_proj.weight
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    muon.step()
    singular = torch.linalg.svdvals((before - weight.detach()) / (0.01 * 0.2 * 96**0.5))
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3  # as near 1 as five Newton-Schulz steps come


@pytest.mark.parametrize("decay_all", [False, True])
def test_norms_and_embeddings_decay_only_when_asked(decay_all):
    model = MobiLlama(ModelConfig(31, 16, 24, 2, 2))
    (optimizer,) = build_optimizers(model, OptimizerConfig(weight_decay=0.1, decay_all=decay_all))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    free = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    norms = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert free == (set() if decay_all else norms | {"model.embed_tokens.weight"})


def test_update_equals_adamw_written_out():
    """One step by the formulas of Loshchilov and Hutter (2019), algorithm 2, with decoupled decay scaled by the rate."""
    model = MobiLlama(ModelConfig(31, 16, 24, 1, 2))
    weight = model.lm_head.weight
    (optimizer,) = build_optimizers(model, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    before, gradient = weight.detach().double(), torch.randn_like(weight)
    weight.grad = gradient.clone()
    optimizer.step()
    g = gradient.double()
    moment, square = (0.1 * g) / (1 - 0.9), (0.05 * g * g) / (1 - 0.95)
    expected = before * (1 - 0.01 * 0.1) - 0.01 * moment / (square.sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-7, rtol=1e-5)
