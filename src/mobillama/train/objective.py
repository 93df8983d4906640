"""What a micro-batch passes through: the model and its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mobillama.model.loss import IGNORE, linear_cross_entropy, token_losses
from mobillama.model.transformer import MobiLlama


class Objective(nn.Module):
    """A model with its loss, which processes that train together distribute as one module.

    Args:
        model: the model.
        z_loss: see :func:`mobillama.model.loss.linear_cross_entropy`.
        mask_documents: whether documents are not to see each other, and positions count anew in each.
        eos_id: the end mark that divides documents where marks do not.
        precision: makes the context that the model computes in.
    """

    def __init__(
        self,
        model: MobiLlama,
        z_loss: float = 0.0,
        mask_documents: bool = False,
        eos_id: int = -1,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self.z_loss, self.precision = model, z_loss, precision
        self.mask_documents, self.eos_id = mask_documents, eos_id

    def forward(self, ids_bs: Tensor, marks_bs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what is minimised, summed over sequences (b, t + 1), and each token's loss in nats (b, t).

        ``marks_bs`` are those of :class:`mobillama.data.dataset.Batch`; what they do not let learn has a loss of 0.
        """
        inputs_bt, targets_bt = ids_bs[:, :-1], ids_bs[:, 1:]
        documents_bt = None
        if self.mask_documents:
            documents_bt = document_ids(inputs_bt, self.eos_id) if marks_bs is None else marks_bs[:, :-1] >> 1
        if marks_bs is not None:
            targets_bt = torch.where(marks_bs[:, 1:] % 2 == 1, targets_bt, IGNORE)
        with self.precision():
            hidden_btc = self.model.model(inputs_bt, document_ids=documents_bt)
            if torch.is_grad_enabled():
                return linear_cross_entropy(hidden_btc, self.model.lm_head.weight, targets_bt, self.z_loss)
            losses_bt = token_losses(self.model.lm_head(hidden_btc), targets_bt)
            return losses_bt.sum(), losses_bt


def document_ids(ids_bt: Tensor, eos_id: int) -> Tensor:
    """Return which document of its sequence each token belongs to, counted from 0 (b, t).

    An end mark belongs to the document that it ends; text never holds one (the tokenizer has no other way to it).
    """
    ends_bt = (ids_bt == eos_id).long()
    return ends_bt.cumsum(1) - ends_bt
