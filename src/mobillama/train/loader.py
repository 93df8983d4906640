"""Reads sequences ahead of the step that learns from them, and says so when storage keeps it waiting."""

from __future__ import annotations

import time
from collections.abc import Callable

from mobillama.data.dataset import Batch, partition
from mobillama.errors import UsageError
from mobillama.train.background import Background
from mobillama.train.task import Data
from mobillama.train.world import World

_PATIENCE = 8.0  # seconds until a reader counts as hung
_READERS = 6  # that are tried one after another


class Loader:
    """A process's micro-batches, in order; a thread reads ahead.

    Since a batch is a pure function of its step, a reader that hangs is replaced by another that reads the same: nothing
    is lost or taken twice.

    Args:
        dataset: what is read.
        seed: seed of the order.
        batch_size: sequences of a step, over all processes.
        micro_batch_size: sequences of a micro-batch.
        world: the processes that share a step.
        on_note: told when a reader hangs.
    """

    def __init__(
        self,
        dataset: Data,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        world: World,
        on_note: Callable[[str], None],
    ) -> None:
        self.dataset, self.seed, self.batch_size, self.world, self.on_note = dataset, seed, batch_size, world, on_note
        self.parts = partition(batch_size, micro_batch_size, world.rank, world.size)
        self.waited = 0.0
        """Seconds that steps have waited for data."""
        self._ahead: dict[int, Background[list[Batch]]] = {}

    def take(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step (from 0).

        Raises:
            CorruptDataError: a sequence differs from what was prepared.
            UsageError: storage does not answer.
        """
        started = time.perf_counter()
        reader = self._ahead.pop(step, None) or self._start(step)
        for _ in range(_READERS):
            if reader.ended(_PATIENCE):
                batches = reader.result()
                break
            self.on_note(
                f"{self.dataset.path}: step {step + 1} has waited {_PATIENCE:.0f} s for its data; asking another reader"
            )
            reader = self._start(step)
        else:
            raise UsageError(
                f"{self.dataset.path}: does not answer for {_READERS * _PATIENCE:.0f} s; look at the storage and run the "
                "same command again"
            )
        self.waited += time.perf_counter() - started
        return batches

    def read_ahead(self, step: int) -> None:
        """Begin to read a step."""
        self._ahead = {step: self._start(step)}

    def close(self) -> None:
        """Wait for a reader that is at work, unless it hangs."""
        for reader in self._ahead.values():
            reader.ended(_PATIENCE)

    def _start(self, step: int) -> Background[list[Batch]]:
        return Background(lambda: [self.dataset.batch(self.seed, step, self.batch_size, part) for part in self.parts])
