from __future__ import annotations

import torch

from mobillama.model.loss import IGNORE, token_losses


def test_token_losses_are_negative_log_probabilities_in_float32_and_zero_where_ignored():
    logits, targets = torch.randn(2, 5, 11).bfloat16(), torch.randint(0, 11, (2, 5))
    targets[1, 3] = IGNORE
    losses = token_losses(logits, targets)
    expected = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected[1, 3] = 0
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=1e-6)
