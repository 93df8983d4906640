"""Loss on the hold-out, per source, in bits per byte: comparable between tokenizers, models and compressors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mobillama.data.dataset import Dataset
from mobillama.data.tokenizer import token_lengths
from mobillama.model.loss import token_losses


@dataclass(frozen=True)
class SourceLoss:
    """Loss on held-out sequences of one source."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the scored text."""
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)


def validate(
    model: nn.Module,
    dataset: Dataset,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
    batch_size: int,
    limit: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    eos_id: int | None = None,
) -> dict[str, SourceLoss]:
    """Return the loss on the first ``limit`` (0: all) held-out sequences of each source.

    The first id of a sequence is context only; every other id is scored, end marks too (their text is of 0 bytes).
    Sources without hold-out are left out. ``progress`` is told (sequences done, all sequences). With ``eos_id``, the end
    mark, no token sees another document.
    """
    lengths = token_lengths(dataset.tokenizer)
    held: dict[str, NDArray[np.int64]] = {name: dataset.holdout(name, limit) for name in dataset.source_names}
    total, done = sum(len(ids) for ids in held.values()), 0
    losses = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for name, ids in held.items():
            nats = 0.0
            for start in range(0, len(ids), batch_size):
                batch = torch.from_numpy(ids[start : start + batch_size]).to(device)
                with autocast():
                    logits_btv = model(batch[:, :-1], document_ids=document_ids(batch[:, :-1], eos_id))
                    losses_bt = token_losses(logits_btv, batch[:, 1:])
                nats += float(losses_bt.double().sum())
                done += len(batch)
                progress(done, total)
            if len(ids):
                losses[name] = SourceLoss(nats, ids[:, 1:].size, int(lengths[ids[:, 1:]].sum()))
    model.train(was_training)
    return losses


def document_ids(ids_bt: torch.Tensor, eos_id: int | None) -> torch.Tensor | None:
    """Return which document of its sequence each token belongs to, counted from 0 (b, t); None without ``eos_id``.

    An end mark belongs to the document that it ends; text never holds one (the tokenizer has no other way to it).
    """
    if eos_id is None:
        return None
    ends_bt = (ids_bt == eos_id).long()
    return ends_bt.cumsum(1) - ends_bt


def combined(losses: dict[str, SourceLoss]) -> SourceLoss:
    """Return the loss over all sources together."""
    return SourceLoss(
        sum(loss.nats for loss in losses.values()),
        sum(loss.tokens for loss in losses.values()),
        sum(loss.bytes for loss in losses.values()),
    )
