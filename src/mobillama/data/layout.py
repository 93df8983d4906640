"""Where each training sequence comes from: arithmetic between a stored row, its source, and its place in the source.

Each source is one stream of ids cut into sequences. A permutation of a source's sequences puts the hold-out first; the
others, dealt out as often as the source's weight says, are ranked one source behind the other; a permutation of all ranks
is the order of the chunks. Both directions are computed, nothing is stored. Only an imported data set, whose order is
given, stores a label for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mobillama.data.order import Permutation


@dataclass(frozen=True)
class SourceCount:
    """Sequences of one source, how many of them are held out, and how many rows the others are dealt to.

    ``dealt`` is sequences - holdout at weight 1; more repeats them from the first, less leaves the last ones out.
    """

    name: str
    sequences: int
    holdout: int
    dealt: int

    @property
    def trainable(self) -> int:
        """Sequences that are not held out."""
        return self.sequences - self.holdout


class Layout:
    """The order in which prepared sequences are stored.

    Args:
        corpus_root: digest of all documents; other documents give another order.
        seed: the preparation's seed.
        sources: the sources in the order of the recipe.
    """

    def __init__(self, corpus_root: bytes, seed: int, sources: list[SourceCount]) -> None:
        self.sources = sources
        self.train_size = sum(source.dealt for source in sources)
        self._starts = np.cumsum([0] + [source.dealt for source in sources])
        self.holdout_starts = self.train_size + np.cumsum([0] + [source.holdout for source in sources])
        prefix = corpus_root + f"/prepare/{seed}/".encode()
        self._within = [Permutation(prefix + s.name.encode(), s.sequences) if s.sequences else None for s in sources]
        self._shuffle = Permutation(prefix, self.train_size) if self.train_size else None

    def train_origin(self, row: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (source index, sequence within the source) of stored training rows."""
        assert self._shuffle is not None
        rank = self._shuffle.inverse(row)
        source = self._source_of_rank(rank)
        sequence = np.empty_like(rank)
        for index, count in enumerate(self.sources):
            chosen = np.flatnonzero(source == index)
            if len(chosen):
                within = (rank[chosen] - self._starts[index]) % count.trainable
                sequence[chosen] = self._permutation(index)(within + count.holdout)
        return source, sequence

    def source_of(self, row: ArrayLike) -> NDArray[np.int64]:
        """Return the source index of stored training rows."""
        assert self._shuffle is not None
        return self._source_of_rank(self._shuffle.inverse(row))

    def train_rows(self, source: int, sequence: ArrayLike) -> NDArray[np.int64]:
        """Return the stored training rows of sequences of a source: (n, copies), -1 where there is none."""
        count = self.sources[source]
        copies = -(-count.dealt // count.trainable) if count.trainable else 0
        within = self._permutation(source).inverse(sequence) - count.holdout
        rank = within[:, None] + np.arange(copies) * count.trainable
        rows = np.full_like(rank, -1)
        trained = (within[:, None] >= 0) & (rank < count.dealt)
        if trained.any():
            assert self._shuffle is not None
            rows[trained] = self._shuffle(rank[trained] + self._starts[source])
        return rows

    def destinations(self, source: int, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the sequences start…end of a source are stored: (sequence - start, row), one entry a copy.

        Held-out sequences count on behind the training rows: those of source s begin at ``holdout_starts[s]``.
        """
        sequences = np.arange(start, end)
        rows = self.train_rows(source, sequences)
        index, copy = np.nonzero(rows >= 0)
        place = self._permutation(source).inverse(sequences)
        held = np.flatnonzero(place < self.sources[source].holdout)
        return np.concatenate([index, held]), np.concatenate(
            [rows[index, copy], place[held] + self.holdout_starts[source]]
        )

    def holdout_sequences(self, source: int) -> NDArray[np.int64]:
        """Return the sequences of a source that are held out, in the order they are stored."""
        count = self.sources[source].holdout
        return self._permutation(source)(np.arange(count)) if count else np.empty(0, dtype=np.int64)

    def _source_of_rank(self, rank: NDArray[np.int64]) -> NDArray[np.int64]:
        return (np.searchsorted(self._starts, rank, side="right") - 1).astype(np.int64)

    def _permutation(self, source: int) -> Permutation:
        permutation = self._within[source]
        assert permutation is not None
        return permutation


class GivenLayout:
    """The order of imported sequences, which is as it is: their labels are stored.

    The sequences of a source count in the order of the rows that bear its label; the held-out ones come behind them.

    Args:
        sources: the sources in the order of their labels.
        counts: (chunks, sources) rows of each chunk that bear each label.
        labels: returns the labels of a chunk's rows, (rows,) source indices.
    """

    def __init__(
        self, sources: list[SourceCount], counts: NDArray[np.int64], labels: Callable[[int], NDArray[np.uint8]]
    ) -> None:
        self.sources = sources
        self._labels = labels
        self._starts = np.concatenate([[0], counts.sum(1).cumsum()])
        self._firsts = np.vstack([np.zeros((1, len(sources)), np.int64), counts.cumsum(0)])
        self.train_size = int(self._starts[-1])
        self.holdout_starts = self.train_size + np.cumsum([0] + [source.holdout for source in sources])

    def train_origin(self, row: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (source index, sequence within the source) of stored training rows."""
        rows = np.atleast_1d(np.asarray(row, np.int64))
        source, sequence = self.source_of(rows), np.empty_like(rows)
        for chunk, chosen in self._by_chunk(rows):
            for index in np.unique(source[chosen]):
                mine = chosen[source[chosen] == index]
                places = np.flatnonzero(self._labels(chunk) == index)
                sequence[mine] = self._firsts[chunk, index] + np.searchsorted(places, rows[mine] - self._starts[chunk])
        return source, sequence

    def source_of(self, row: ArrayLike) -> NDArray[np.int64]:
        """Return the source index of stored training rows."""
        rows = np.atleast_1d(np.asarray(row, np.int64))
        source = np.empty_like(rows)
        for chunk, chosen in self._by_chunk(rows):
            source[chosen] = self._labels(chunk)[rows[chosen] - self._starts[chunk]]
        return source

    def train_rows(self, source: int, sequence: ArrayLike) -> NDArray[np.int64]:
        """Return the stored training rows of sequences of a source: (n, 1), -1 for one that is held out."""
        sequences = np.atleast_1d(np.asarray(sequence, np.int64))
        rows = np.full((len(sequences), 1), -1)
        trained = np.flatnonzero(sequences < self.sources[source].dealt)
        chunks = np.searchsorted(self._firsts[:, source], sequences[trained], side="right") - 1
        for chunk in np.unique(chunks).tolist():
            mine = trained[chunks == chunk]
            places = np.flatnonzero(self._labels(chunk) == source)
            rows[mine, 0] = self._starts[chunk] + places[sequences[mine] - self._firsts[chunk, source]]
        return rows

    def destinations(self, source: int, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the sequences start…end of a source are stored, as :meth:`Layout.destinations` does."""
        sequences = np.arange(start, end)
        rows = self.train_rows(source, sequences)[:, 0]
        behind = sequences - self.sources[source].dealt + self.holdout_starts[source]
        return sequences - start, np.where(rows >= 0, rows, behind)

    def holdout_sequences(self, source: int) -> NDArray[np.int64]:
        """Return the sequences of a source that are held out, in the order they are stored."""
        return np.arange(self.sources[source].dealt, self.sources[source].sequences)

    def _by_chunk(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each chunk that holds some of the rows, and which ones."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.train_size:
            raise IndexError(f"a row outside 0…{self.train_size - 1}")
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        for chunk in np.unique(chunks).tolist():
            yield chunk, np.flatnonzero(chunks == chunk)
