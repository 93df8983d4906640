"""GPTQ changes outputs less than rounding does, and its pieces are what the paper's formulas say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobillama.compress import gptq
from mobillama.compress.gptq import output_error, quantize_matrix
from mobillama.engine.blocks import BLOCK, Q4_0, TYPES, decode, encode, pack
from mobillama.errors import UsageError

KINDS = ("q4_0", "q4_1", "q8_0")


def rounded(weight, kind):
    return torch.from_numpy(decode(encode(weight.numpy(), kind), kind))


def quantized(weight, hessian, kind):
    return torch.from_numpy(decode(pack(quantize_matrix(weight, hessian, kind), kind), kind))


@pytest.fixture
def layer():
    """A matrix and the Hessian of inputs whose channels are related and of unequal size, as those of a model are."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 96, generator=draw) @ torch.randn(96, 96, generator=draw).tril()
    x = x * torch.logspace(0, 1.5, 96)[torch.randperm(96, generator=draw)]
    return torch.randn(40, 96, generator=draw) * 0.02, x.T @ x


@pytest.mark.parametrize("kind", [TYPES[name] for name in KINDS], ids=KINDS)
def test_outputs_change_far_less_than_by_rounding(kind, layer):
    weight, hessian = layer
    ours = output_error(weight, quantized(weight, hessian, kind), hessian)
    assert ours < 0.5 * output_error(weight, rounded(weight, kind), hessian)


@pytest.mark.parametrize("kind", [TYPES[name] for name in KINDS], ids=KINDS)
def test_inputs_that_are_independent_leave_nearly_rounding(kind, layer):
    """With H the identity no error moves: each weight is at the nearest code of its block's scale, which is well chosen."""
    weight, identity = layer[0], torch.eye(96)
    ours, nearest = quantized(weight, identity, kind), rounded(weight, kind)
    for same in (None, 7 * identity):
        assert output_error(ours, quantized(weight, same, kind), identity) < 1e-4  # ties may fall otherwise
    step = (weight.view(40, -1, BLOCK).amax(-1) - weight.view(40, -1, BLOCK).amin(-1)) / (
        255 if kind.name == "Q8_0" else 15
    )
    assert ((ours - nearest).abs().view(40, -1, BLOCK) <= 1.5 * step[..., None]).all()
    assert 0.7 < (ours - weight).square().sum() / (nearest - weight).square().sum() < 1


def test_one_scale_reproduces_the_papers_algorithm(layer, monkeypatch):
    """Against algorithm 1 written with loops and the plain inverse of H, which loses a row and a column after each step."""
    weight, hessian = layer
    scale = float(np.float16(0.006))
    monkeypatch.setattr(
        gptq, "_candidates", lambda w, grid: (torch.full((1, w.shape[1]), scale), torch.zeros(1, w.shape[1]))
    )
    monkeypatch.setattr(gptq, "_REFITS", 0)
    blocks = quantize_matrix(weight, hessian, Q4_0)
    order = gptq._order(hessian.diagonal())
    left, rest = hessian[order][:, order].double(), weight[:, order].double()
    left += 0.01 * left.diagonal().mean() * torch.eye(96)
    expected = torch.empty(40, 96)
    inverse = torch.linalg.inv(left)
    for column in range(96):
        code = (rest[:, 0] / scale).round().clamp(-8, 7)
        expected[:, column] = code
        error = (rest[:, 0] - code * scale) / inverse[0, 0]
        rest = rest[:, 1:] - error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    found = torch.from_numpy(blocks.codes_rgk.reshape(40, 96).astype(np.float32))[:, order] - 8
    assert (found == expected).float().mean() > 0.99  # a tie may fall otherwise in float32
    assert (blocks.scale_rg == np.float16(scale)).all()


def test_columns_are_ordered_without_tearing_blocks():
    importance = torch.rand(4 * BLOCK, generator=torch.Generator().manual_seed(1))
    order = gptq._order(importance)
    assert sorted(order.tolist()) == list(range(4 * BLOCK))
    groups = order.view(-1, BLOCK) // BLOCK
    assert (groups == groups[:, :1]).all()
    sums = importance.view(-1, BLOCK).sum(1)[groups[:, 0]]
    assert (sums.diff() <= 0).all() and (importance[order].view(-1, BLOCK).diff(dim=1) <= 0).all()


def test_what_is_degenerate_survives(layer):
    weight, hessian = layer
    weight, hessian = weight.clone(), hessian.clone()
    weight[3], weight[:, 5] = 0, 0
    hessian[7], hessian[:, 7] = 0, 0
    for kind in map(TYPES.get, KINDS):
        found = quantized(weight, hessian, kind)
        assert found.isfinite().all() and not found[3].any()
        assert quantized(weight, torch.zeros(96, 96), kind).isfinite().all()
    weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="infinite numbers or NaN"):
        quantize_matrix(weight, hessian, Q4_0)
    weight[0, 0] = 1e7
    with pytest.raises(UsageError, match="beyond float16"):
        quantize_matrix(weight, hessian, Q4_0)
