"""A prepared data set: batches that are a pure function of (manifest, seed, step), and where every sequence came from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.layout import GivenLayout, Layout, SourceCount
from mobillama.data.ledger import Ledger
from mobillama.data.order import order
from mobillama.data.store import SequenceFile
from mobillama.data.tokenizer import Tokenizer, load_tokenizer, token_lengths
from mobillama.errors import UsageError
from mobillama.record.manifest import MANIFEST_NAME, read_manifest, verify_manifest

FORMAT = "mobillama-dataset-2"
GIVEN = "given"  # the manifest's "order" where sequences stand as they were imported, not as they were dealt out
PREPARATION_NAME = "preparation.json"
INDEX_NAME = "trace-index"  # what trace keeps beside the data


@dataclass(frozen=True)
class Span:
    """A stretch of a sequence that belongs to one document: ``start``…``end`` within the sequence."""

    start: int
    end: int
    document: int
    file: str
    line: int
    digest: str


@dataclass(frozen=True)
class Batch:
    """Sequences of a step: ids (n, sequence length), stored rows (n,) and source indices (n,)."""

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    sources: NDArray[np.int64]
    marks: NDArray[np.int64] | None = None
    """For each id twice the number of its document within the sequence, and one more where it is to be learned (n,
    sequence length). None: all ids are, and an end mark ends a document."""

    def learned_ids(self, sequences: int | None = None) -> NDArray[np.int64]:
        """Return what is to be learned of the first sequences: all ids behind each one's first, or those with marks."""
        ids = self.ids[:sequences, 1:]
        return ids if self.marks is None else ids[self.marks[:sequences, 1:] % 2 == 1]


def partition(batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[slice]:
    """Return the parts of a step's batch that a rank takes through the model, one micro-batch after another.

    However a batch is divided, the parts of all ranks together are the batch, each sequence once.
    """
    first, last = (batch_size * r // world_size for r in (rank, rank + 1))
    return [slice(start, min(start + micro_batch_size, last)) for start in range(first, last, micro_batch_size)]


def dataset_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a data set.

    Raises:
        UsageError: there is no data set at ``path``.
        CorruptDataError: its manifest is damaged.
    """
    if not (path / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{path}: no prepared data there; make it with 'mobillama data prepare RECIPE.yaml --out {path}' "
            "(relative paths start at the working directory)"
        )
    return read_manifest(path, FORMAT)


class Dataset:
    """A directory that :mod:`mobillama.data.prepare.pipeline` or :mod:`mobillama.data.amber_import` wrote.

    Raises:
        UsageError: there is no data set at ``path``.
        CorruptDataError: its manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = dataset_manifest(path)
        inputs = self.manifest["inputs"]
        self.digest: str = self.manifest["digest"]
        self.ledger = Ledger(path, self.manifest)
        self.root = bytes.fromhex(self.manifest["root"])
        self.prepared_seed: int = inputs["seed"]
        self.sequence_length: int = inputs["sequence_length"]
        self.vocab_size: int = inputs["vocab_size"]
        self.size: int = self.manifest["train_sequences"]
        self.source_names: list[str] = [source["name"] for source in self.manifest["sources"]]
        self.layout = self._layout()
        self._chunks = [self._sequence_file(chunk) for chunk in self.manifest["chunks"]]
        self._holdout = {entry["source"]: self._sequence_file(entry) for entry in self.manifest["holdout"]}
        self._chunk_starts = np.cumsum([0] + [chunk["rows"] for chunk in self.manifest["chunks"]])

    def check_sizes(self) -> None:
        """Check that all files are there in their full length, which takes no time; hashes are checked as they are read.

        Raises:
            CorruptDataError: one is missing or has another size.
        """
        verify_manifest(self.path, self.manifest, hashed=False)

    @property
    def chunk_ends(self) -> list[int]:
        """The number of training sequences in the first chunk, in the first two, and so on."""
        return [int(end) for end in self._chunk_starts[1:]]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, its files checked against the manifest."""
        verify_manifest(self.path, self.manifest, "tokenizer/")
        return load_tokenizer(self.path / "tokenizer")

    @functools.cached_property
    def token_lengths(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for; end marks stand for none."""
        return token_lengths(self.tokenizer)

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> NDArray[np.int64]:
        """Return the stored rows of step ``step`` (from 0), in order; epochs follow one another without a gap.

        Epoch 0 of the prepared seed is the stored order itself; every other epoch and seed is
        :func:`mobillama.data.order.order`.
        """
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        stored = (positions < self.size) & (seed == self.prepared_seed)
        rows = positions.copy()
        if not stored.all():
            rows[~stored] = order(self.root, seed, self.size, positions[~stored])
        return rows

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        """Return the sequences of a step, or a ``part`` of them (a rank's share, a micro-batch).

        Raises:
            CorruptDataError: a sequence differs from what was prepared.
        """
        rows = self.rows_of_step(seed, step, batch_size)[part]
        return Batch(self.read(rows), rows, self.layout.source_of(rows))

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return stored training sequences (n, sequence length), each checked against its hash."""
        ids = np.empty((len(rows), self.sequence_length), dtype=np.int64)
        chunk_of_row = np.searchsorted(self._chunk_starts, rows, side="right") - 1
        for chunk in np.unique(chunk_of_row):
            chosen = chunk_of_row == chunk
            ids[chosen] = self._chunks[chunk].read(rows[chosen] - self._chunk_starts[chunk])
        return ids

    def learned_tokens(self, seed: int, step: int, batch_size: int) -> int:
        """Return how many tokens a step learns from: all but the first of each sequence."""
        return batch_size * (self.sequence_length - 1)

    @property
    def holdout_sizes(self) -> dict[str, int]:
        """The number of held-out sequences of each source."""
        return {name: file.rows for name, file in self._holdout.items()}

    def holdout_batch(self, source: str, limit: int, start: int) -> Batch:
        """Return :meth:`holdout` as validation takes it."""
        ids = self.holdout(source, limit, start)
        sources = np.full(len(ids), self.source_names.index(source))
        return Batch(ids, np.arange(start, start + len(ids)), sources)

    def holdout(self, source: str, limit: int = 0, start: int = 0) -> NDArray[np.int64]:
        """Return ``limit`` (0: all) held-out sequences of a source from ``start`` on, each checked against its hash."""
        file = self.holdout_file(source)
        end = min(start + limit, file.rows) if limit else file.rows
        return file.read(np.arange(start, end)).astype(np.int64)

    def holdout_file(self, source: str) -> SequenceFile:
        """Return the file of a source's held-out sequences."""
        return self._holdout[source]

    def spans(self, row: int) -> list[Span]:
        """Return the documents that a stored training row is made of, in order."""
        (source,), (sequence,) = (part.tolist() for part in self.layout.train_origin([row]))
        return self.spans_of(source, sequence)

    def spans_of(self, source: int, sequence: int) -> list[Span]:
        """Return the documents that a sequence of a source is made of, in order."""
        first, last = sequence * self.sequence_length, (sequence + 1) * self.sequence_length
        spans = []
        for number in range(self.ledger.at(source, first), self.ledger.at(source, last - 1) + 1):
            entry, start = self.ledger.entry(source, number), self.ledger.start(source, number)
            if entry.tokens:
                begin, end = max(start - first, 0), min(start + entry.tokens, last) - first
                spans.append(Span(begin, end, number, entry.file, entry.line, entry.digest))
        return spans

    def _layout(self) -> Layout | GivenLayout:
        sources, chunks = self.manifest["sources"], self.manifest["chunks"]
        counts = [SourceCount(s["name"], s["sequences"], s["holdout_sequences"], s["dealt_sequences"]) for s in sources]
        if self.manifest.get("order") != GIVEN:
            return Layout(bytes.fromhex(self.manifest["corpus_root"]), self.prepared_seed, counts)
        rows = [[chunk["rows_of_source"].get(name, 0) for name in self.source_names] for chunk in chunks]
        return GivenLayout(counts, np.array(rows, np.int64), functools.cache(self._labels))

    def _labels(self, chunk: int) -> NDArray[np.uint8]:
        """Return the labels of an imported chunk's rows, memory-mapped, after checking their file."""
        name = self.manifest["chunks"][chunk]["labels"]
        verify_manifest(self.path, self.manifest, name)
        labels: NDArray[np.uint8] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        return labels

    def _sequence_file(self, entry: dict[str, Any]) -> SequenceFile:
        shape, dtype = (entry["rows"], self.sequence_length), np.dtype(self.manifest["dtype"])
        return SequenceFile(self.path / entry["file"], shape, dtype, bytes.fromhex(entry["root"]))
