"""What a micro-batch passes through: the model and its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mobillama.model.loss import linear_cross_entropy, token_losses
from mobillama.model.transformer import MobiLlama


class Objective(nn.Module):
    """A model with its loss, which processes that train together distribute as one module.

    Args:
        model: the model.
        z_loss: see :func:`mobillama.model.loss.linear_cross_entropy`.
        eos_id: the end mark where documents are not to see each other.
        precision: makes the context that the model computes in.
    """

    def __init__(
        self,
        model: MobiLlama,
        z_loss: float = 0.0,
        eos_id: int | None = None,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self.z_loss, self.eos_id, self.precision = model, z_loss, eos_id, precision

    def forward(self, ids_bs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is minimised, summed over sequences (b, t + 1), and each token's loss in nats (b, t)."""
        inputs_bt, targets_bt = ids_bs[:, :-1], ids_bs[:, 1:]
        with self.precision():
            hidden_btc = self.model.model(inputs_bt, document_ids=document_ids(inputs_bt, self.eos_id))
            if torch.is_grad_enabled():
                return linear_cross_entropy(hidden_btc, self.model.lm_head.weight, targets_bt, self.z_loss)
            losses_bt = token_losses(self.model.lm_head(hidden_btc), targets_bt)
            return losses_bt.sum(), losses_bt


def document_ids(ids_bt: Tensor, eos_id: int | None) -> Tensor | None:
    """Return which document of its sequence each token belongs to, counted from 0 (b, t); None without ``eos_id``.

    An end mark belongs to the document that it ends; text never holds one (the tokenizer has no other way to it).
    """
    if eos_id is None:
        return None
    ends_bt = (ids_bt == eos_id).long()
    return ends_bt.cumsum(1) - ends_bt
