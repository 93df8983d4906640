"""Where each training sequence comes from: arithmetic between a stored row, its source, and its place in the source.

Each source is one stream of ids cut into sequences. A permutation of a source's sequences puts the hold-out first; a
permutation of all other sequences is the order of the chunks. Both directions are computed, nothing is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mobillama.data.order import Permutation


@dataclass(frozen=True)
class SourceCount:
    """Sequences of one source and how many of them are held out."""

    name: str
    sequences: int
    holdout: int


class Layout:
    """The order in which prepared sequences are stored.

    Args:
        corpus_root: digest of all documents; other documents give another order.
        seed: the preparation's seed.
        sources: the sources in the order of the recipe.
    """

    def __init__(self, corpus_root: bytes, seed: int, sources: list[SourceCount]) -> None:
        self.sources = sources
        self.train_size = sum(source.sequences - source.holdout for source in sources)
        self._starts = np.cumsum([0] + [source.sequences - source.holdout for source in sources])
        prefix = corpus_root + f"/prepare/{seed}/".encode()
        self._within = [Permutation(prefix + s.name.encode(), s.sequences) if s.sequences else None for s in sources]
        self._shuffle = Permutation(prefix, self.train_size) if self.train_size else None

    def train_origin(self, row: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (source index, sequence within the source) of stored training rows."""
        assert self._shuffle is not None
        rank = self._shuffle.inverse(row)
        source = np.searchsorted(self._starts, rank, side="right") - 1
        sequence = np.empty_like(rank)
        for index in np.unique(source):
            chosen = source == index
            holdout = self.sources[index].holdout
            sequence[chosen] = self._permutation(int(index))(rank[chosen] - self._starts[index] + holdout)
        return source.astype(np.int64), sequence

    def train_row(self, source: int, sequence: ArrayLike) -> NDArray[np.int64]:
        """Return the stored training row of sequences of a source; -1 where a sequence is held out."""
        assert self._shuffle is not None
        rank = self._permutation(source).inverse(sequence) - self.sources[source].holdout
        rows = np.full_like(rank, -1)
        trained = rank >= 0
        if trained.any():
            rows[trained] = self._shuffle(rank[trained] + self._starts[source])
        return rows

    def holdout_sequences(self, source: int) -> NDArray[np.int64]:
        """Return the sequences of a source that are held out, in the order they are stored."""
        count = self.sources[source].holdout
        return self._permutation(source)(np.arange(count)) if count else np.empty(0, dtype=np.int64)

    def _permutation(self, source: int) -> Permutation:
        permutation = self._within[source]
        assert permutation is not None
        return permutation
