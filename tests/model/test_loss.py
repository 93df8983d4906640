from __future__ import annotations

import pytest
import torch

from mobillama.model import loss
from mobillama.model.loss import IGNORE, linear_cross_entropy, token_losses


def test_token_losses_are_negative_log_probabilities_in_float32_and_zero_where_ignored():
    logits, targets = torch.randn(2, 5, 11).bfloat16(), torch.randint(0, 11, (2, 5))
    targets[1, 3] = IGNORE
    losses = token_losses(logits, targets)
    expected = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected[1, 3] = 0
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
def test_linear_cross_entropy_equals_logits_in_full_with_gradients(rows, monkeypatch):
    monkeypatch.setattr(loss, "_CPU_CHUNK", rows * 31)
    hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(0, 31, (3, 5))
    targets[0, 2:] = IGNORE
    total, losses = linear_cross_entropy(hidden, weight, targets)
    (total * 0.3).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = token_losses(hidden @ weight.T, targets)
    (expected.sum() * 0.3).backward()
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(found, (hidden.grad, weight.grad))
    assert not losses.requires_grad


def test_z_loss_adds_the_squared_log_normaliser_to_the_sum_alone(monkeypatch):
    monkeypatch.setattr(loss, "_CPU_CHUNK", 4 * 31)
    hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(0, 31, (3, 5))
    targets[0, 2:] = IGNORE
    total, losses = linear_cross_entropy(hidden, weight, targets, z_loss=0.03)
    total.backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    plain = token_losses(logits, targets)
    expected = plain.sum() + 0.03 * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
    expected.backward()
    torch.testing.assert_close(losses, plain.detach())
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


def test_heads_gradient_adds_in_float32_over_chunks_under_autocast(monkeypatch):
    """Against products of the same bfloat16 numbers in float64: only their rounding per chunk is left."""
    hidden, weight = torch.randn(1, 4096, 16), torch.randn(31, 16, requires_grad=True)
    targets = torch.randint(0, 31, (1, 4096))
    errors = {}
    for rows in (4096, 64):
        monkeypatch.setattr(loss, "_CPU_CHUNK", rows * 31)
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            linear_cross_entropy(hidden, weight, targets)[0].backward()
        rounded, states = weight.detach().bfloat16(), hidden.bfloat16()[0]
        grad = (states @ rounded.T).float().softmax(-1) - torch.nn.functional.one_hot(targets[0], 31)
        exact = grad.bfloat16().double().T @ states.double()
        errors[rows] = float((weight.grad.double() - exact).norm() / exact.norm())
    assert weight.grad.dtype == torch.float32
    assert max(errors.values()) < 3e-3
