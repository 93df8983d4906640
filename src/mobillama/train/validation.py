"""Loss on the hold-out, per source, in bits per byte: comparable between tokenizers, models and compressors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mobillama.train.task import Data
from mobillama.train.world import World


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
    losses: Callable[[Tensor, Tensor | None], Tensor],
    dataset: Data,
    world: World,
    batch_size: int,
    limit: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, SourceLoss]:
    """Return the loss on the first ``limit`` (0: all) held-out sequences of each source.

    The first id of a sequence is context only; every other id is scored, end marks too (their text is of 0 bytes), or
    what the marks of a sequence let learn. Sources without hold-out are left out.

    Args:
        losses: maps sequences (b, s) and their marks to their tokens' losses (b, s - 1) in nats, 0 where a token is not
            scored; all processes call it equally often.
        dataset: what is held out.
        world: the processes that share the sequences.
        batch_size: sequences at once.
        limit: sequences of a source.
        progress: told (sequences done, all sequences).
    """
    rows = {name: min(count, limit) if limit else count for name, count in dataset.holdout_sizes.items()}
    total, done = sum(rows.values()), 0
    found = {}
    with torch.no_grad():
        for name, count in rows.items():
            sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, tokens, bytes
            for start in range(0, count, batch_size * world.size):
                first = start + batch_size * world.rank
                mine = min(batch_size, max(0, count - first))
                # A process without a share still takes part, with a sequence that is not counted.
                batch = dataset.holdout_batch(name, mine or 1, first if mine else 0)
                marks = None if batch.marks is None else torch.from_numpy(batch.marks).to(world.device)
                losses_bt = losses(torch.from_numpy(batch.ids).to(world.device), marks)[:mine]
                scored = batch.learned_ids(mine)
                text = torch.tensor([scored.size, int(dataset.token_lengths[scored].sum())], dtype=torch.float64)
                sums += torch.cat([losses_bt.double().sum()[None], text.to(world.device)])
                done += min(batch_size * world.size, count - start)
                progress(done, total)
            nats, tokens, size = world.sum(sums).tolist()
            if tokens:
                found[name] = SourceLoss(nats, int(tokens), int(size))
    return found


def combined(losses: dict[str, SourceLoss]) -> SourceLoss:
    """Return the loss over all sources together."""
    return SourceLoss(
        sum(loss.nats for loss in losses.values()),
        sum(loss.tokens for loss in losses.values()),
        sum(loss.bytes for loss in losses.values()),
    )
