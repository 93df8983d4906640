"""Calibration sees every use of a matrix, with the inputs that quantized layers give, and quantizes each matrix once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mobillama.compress import calibrate
from mobillama.compress.calibrate import Calibration
from mobillama.engine.blocks import BLOCK, Q4_0, Q4_1, decode, pack
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def built(**changes):
    config = ModelConfig(**{**SHAPE, "initializer_range": 0.2, **changes})
    model = MobiLlama(config).eval().requires_grad_(False)
    initialise(model, config, 0)
    return model


def batches(model, draw=3):
    ids = torch.randint(100, (6, 20), generator=torch.Generator().manual_seed(draw))
    return list(ids.split(2))


def kinds(model, kind=Q4_0):
    weights = model.state_dict()
    return {n: kind for n, w in weights.items() if w.dim() == 2 and w.shape[1] % BLOCK == 0 and n != "lm_head.weight"}


@pytest.fixture
def seen(monkeypatch):
    """The Hessian that each matrix, or joined matrices, were quantized with, in order."""
    found, quantize_matrix = [], calibrate.quantize_matrix

    def watch(weight, hessian, kind):
        found.append((tuple(weight.shape), None if hessian is None else hessian.clone()))
        return quantize_matrix(weight, hessian, kind)

    monkeypatch.setattr(calibrate, "quantize_matrix", watch)
    return found


def inputs_by_loop(model, layer, inner):
    """Return what goes into a network's first or last matrix in one layer, computed plainly."""
    kept = []

    def keep(module, args, named):
        kept.append(args[0] if not inner else F.silu(args[0].chunk(2, -1)[0]) * args[0].chunk(2, -1)[1])

    network = model.model.ffns[model.model.layer_weights[layer][1]]
    hook = (network.down_proj if inner else network.gate_proj).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():  # which is when each matrix is called by itself
        for ids in batches(model):
            model(ids)
    hook.remove()
    uses = [index for index, (_, ffn) in enumerate(model.model.layer_weights) if model.model.ffns[ffn] is network]
    return torch.cat([x.flatten(0, -2) for x in kept[uses.index(layer) :: len(uses)]])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_shared_networks_hessian_is_the_sum_over_its_uses(groups, seen):
    model = built(ffn_groups=groups)
    Calibration(model, batches(model), kinds(model), network_first=True).run()
    fresh = built(ffn_groups=groups)
    table = fresh.model.embed_tokens.weight
    table.copy_(model.model.embed_tokens.weight)  # is quantized before anything is seen
    shape, hessian = seen[1]
    assert shape == (128, 32)
    plain = sum((x := inputs_by_loop(fresh, layer, False)).T @ x for layer in range(4 // groups))
    assert torch.allclose(hessian, plain, rtol=1e-4, atol=1e-4 * float(plain.max()))
    fresh.model.ffns[0].gate_proj.weight.copy_(model.model.ffns[0].gate_proj.weight)
    fresh.model.ffns[0].up_proj.weight.copy_(model.model.ffns[0].up_proj.weight)
    shape, hessian = seen[2]  # sees gate and up already quantized
    assert shape == (32, 64)
    plain = sum((x := inputs_by_loop(fresh, layer, True)).T @ x for layer in range(4 // groups))
    assert torch.allclose(hessian, plain, rtol=1e-4, atol=1e-4 * float(plain.max()))


def test_one_use_alone_can_be_counted(seen):
    model = built()
    Calibration(model, batches(model), kinds(model), uses=[2], network_first=True).run()
    fresh = built()
    fresh.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    x = inputs_by_loop(fresh, 2, False)
    assert torch.allclose(seen[1][1], x.T @ x, rtol=1e-4, atol=1e-4 * float((x.T @ x).max()))


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ({"share": "ffn"}, 1 + 4 * 2 + 2),
        ({"ffn_groups": 2}, 1 + 4 * 2 + 4),
        ({"share": "none"}, 1 + 4 * 4),
        ({"share": "block"}, 5),
    ],
    ids=str,
)
def test_every_matrix_is_quantized_once_and_the_model_holds_its_codes(changes, joined, seen):
    model = built(**changes)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    told = []
    calibration = Calibration(model, batches(model), kinds(model, Q4_1), show=lambda *done: told.append(done))
    blocks = calibration.run()
    assert len(seen) == joined and blocks.keys() == kinds(model).keys()
    for name, weight in model.state_dict().items():
        if name in blocks:
            assert torch.equal(weight, torch.from_numpy(decode(pack(blocks[name], Q4_1), Q4_1)))
            assert 0 < (weight - original[name]).abs().max() < 0.5
        else:
            assert torch.equal(weight, original[name])
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))


def test_later_matrices_see_what_quantized_ones_give(seen):
    """The last layer's attention gets the very inputs that the finished model gives it, where each layer owns its parts."""
    model = built(share="none")
    Calibration(model, batches(model), kinds(model)).run()
    kept = []
    hook = model.model.layers[3].self_attn.q_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():  # which is when each matrix is called by itself
        for ids in batches(model):
            model(ids)
    hook.remove()
    x = torch.cat([part.flatten(0, -2) for part in kept])
    hessian = seen[1 + 4 * 3][1]
    assert torch.allclose(hessian, x.T @ x, rtol=1e-4, atol=1e-4 * float((x.T @ x).max()))


def test_the_callers_weights_are_left_as_they_are():
    model = built()
    kept = model.state_dict()
    before = {name: weight.clone() for name, weight in kept.items()}
    Calibration(model, batches(model), kinds(model)).run()
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())


def test_matrices_whose_rows_are_no_whole_blocks_are_left_alone():
    model = built(hidden_size=48, num_attention_heads=2, head_dim=16)
    blocks = Calibration(model, batches(model), kinds(model)).run()
    assert {name.split(".")[-2] for name in blocks} == {"o_proj", "down_proj"}
