"""The training loss: next-token cross-entropy in float32, kept per token so that it can be summed by source."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def token_losses(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Return the cross-entropy in nats (b, t), computed in float32; 0 where the target is :data:`IGNORE`."""
    losses = F.cross_entropy(
        logits_btv.flatten(0, 1).float(), targets_bt.flatten(), reduction="none", ignore_index=IGNORE
    )
    return losses.view_as(targets_bt)
