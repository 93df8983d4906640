"""Packing: kept documents → sequences → chunks in their final order, with nothing but sequential reading and writing.

Dealing hundreds of millions of sequences to their places one by one would be as many random writes. So a first stage
sorts *runs* of consecutive sequences by their destination, and a second one writes each chunk from the slices that the
runs hold for it. Destinations are arithmetic (:class:`mobillama.data.layout.Layout`); held-out sequences count on behind
the training rows and are files like the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from mobillama.data.layout import Layout
from mobillama.data.ledger import first_beyond
from mobillama.data.prepare.read import ids_path, load_records
from mobillama.data.prepare.stages import Beat
from mobillama.data.store import write_sequences
from mobillama.record.files import replaced_file, write_json

SORT_STAGE, WRITE_STAGE = "sort sequences", "write chunks"

_RUN_BYTES = 128 << 20
_BLOCK_BYTES = 64 << 20
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Stream:
    """The kept documents of a source: the tasks that read them, in order, with the number of the first document of each."""

    name: str
    tasks: tuple[int, ...]
    first_documents: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Consecutive sequences of a source, sorted by one task."""

    source: int
    start: int
    end: int


@dataclass(frozen=True)
class Target:
    """A sequence file to write: its name and the rows (destinations) it holds."""

    name: str
    start: int
    end: int


def plan_runs(layout: Layout, row_bytes: int) -> list[Run]:
    """Cut the sequences of every source into runs of about 128 MiB."""
    runs = []
    for source, count in enumerate(layout.sources):
        copies = max(1.0, count.dealt / max(count.trainable, 1))
        size = max(1, int(_RUN_BYTES / (row_bytes * copies)))
        runs += [Run(source, start, min(start + size, count.sequences)) for start in range(0, count.sequences, size)]
    return runs


def plan_targets(layout: Layout, chunks: int) -> list[Target]:
    """Return the chunks, whose sizes differ by one at most, and behind them the hold-out of every source."""
    borders = np.linspace(0, layout.train_size, chunks + 1).astype(np.int64).tolist()
    targets = [
        Target(f"train/chunk-{number:05d}.npy", borders[number], borders[number + 1]) for number in range(chunks)
    ]
    starts = layout.holdout_starts.tolist()
    for number, source in enumerate(layout.sources):
        targets.append(Target(f"holdout/{source.name}.npy", starts[number], starts[number + 1]))
    return targets


def read_stream(
    work: Path, stream: Stream, dtype: np.dtype[np.unsignedinteger], start: int, end: int
) -> NDArray[np.unsignedinteger]:
    """Return ids start…end of a source's stream: its kept documents one behind the other."""
    table = np.load(work / "documents" / f"{stream.name}.npy", mmap_mode="r", allow_pickle=False)
    first, last = first_beyond(table, start), first_beyond(table, end - 1) + 1
    ends = np.asarray(table["end"][first:last], np.int64)
    begin = int(table["end"][first - 1]) if first else 0
    lengths = np.diff(ends, prepend=begin)
    out = np.empty(end - start, dtype)
    filled = 0
    borders = [*stream.first_documents, len(table)]
    for number, task in enumerate(stream.tasks):
        low, high = max(first, borders[number]), min(last, borders[number + 1])
        if low >= high:
            continue
        records = load_records(work, task)[: high - borders[number]]
        raw_ends = np.asarray(records["end"][low - borders[number] :], np.int64)
        kept = lengths[low - first : high - first]
        raw_starts = (raw_ends - kept)[kept > 0]
        kept = kept[kept > 0]
        if low == first and len(kept):  # the first document may have begun before
            raw_starts[0] += start - begin
            kept[0] -= start - begin
        with open(ids_path(work, task), "rb", buffering=0) as file:
            for offset, count in _segments(raw_starts, kept):
                count = min(count, end - start - filled)
                part = out[filled : filled + count]
                file.seek(offset * dtype.itemsize)
                _read_exactly(file, part)
                filled += count
    if filled != len(out):
        raise RuntimeError(f"{stream.name}: {filled} of {len(out)} ids found at {start}")
    return out


def _segments(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Join documents that stand one behind the other."""
    if not len(starts):
        return
    breaks = np.flatnonzero(starts[1:] != starts[:-1] + counts[:-1]) + 1
    heads = np.concatenate([[0], breaks])
    sums = np.add.reduceat(counts, heads)
    yield from zip(starts[heads].tolist(), sums.tolist(), strict=True)


def _read_exactly(file: Any, out: NDArray[np.unsignedinteger]) -> None:
    view = out.data.cast("B")
    while len(view):
        count = file.readinto(view)
        if not count:
            raise RuntimeError(f"{file.name}: ends too early; remove the unfinished preparation and start again")
        view = view[count:]


class SortRun(PipelineStep):
    """Reads a run's sequences and writes them sorted by destination, beside the destinations."""

    name = SORT_STAGE
    type = "MobiLlama"

    def __init__(
        self, work: Path, layout: Layout, streams: list[Stream], runs: list[Run], dtype: str, length: int
    ) -> None:
        super().__init__()
        self.work, self.layout, self.streams, self.runs = str(work), layout, streams, runs
        self.dtype, self.length = dtype, length

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Sort run ``rank``."""
        run, work, dtype = self.runs[rank], Path(self.work), np.dtype(self.dtype)
        ids = read_stream(work, self.streams[run.source], dtype, run.start * self.length, run.end * self.length)
        sequences = ids.reshape(-1, self.length)
        index, destination = self.layout.destinations(run.source, run.start, run.end)
        order = np.argsort(destination)
        index, destination = index[order], destination[order]
        with replaced_file(run_path(work, rank, "ids")) as temporary, open(temporary, "wb") as file:
            for first in range(0, len(index), _ROWS_AT_ONCE):
                file.write(sequences[index[first : first + _ROWS_AT_ONCE]].data)
        with replaced_file(run_path(work, rank, "rows.npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, destination)
        yield from ()


def run_path(work: Path, rank: int, kind: str) -> Path:
    """Return where a sorted run's ids or destinations stand."""
    return work / "runs" / f"{rank:06d}.{kind}"


class WriteTarget(PipelineStep):
    """Writes a chunk, or a hold-out, from the slices that all runs hold for it."""

    name = WRITE_STAGE
    type = "MobiLlama"

    def __init__(self, work: Path, out: Path, targets: list[Target], runs: int, dtype: str, length: int) -> None:
        super().__init__()
        self.work, self.out, self.targets, self.runs = str(work), str(out), targets, runs
        self.dtype, self.length = dtype, length

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write target ``rank``."""
        target, dtype = self.targets[rank], np.dtype(self.dtype)
        path = Path(self.out) / target.name
        beat = Beat(self.work, WRITE_STAGE, rank)
        shape = (target.end - target.start, self.length)
        root, files = write_sequences(path, shape, dtype, self._blocks(target, dtype, beat))
        folder = path.parent.name
        facts = {
            "file": target.name,
            "rows": shape[0],
            "root": root.hex(),
            "files": {f"{folder}/{name}": fact for name, fact in files.items()},
        }
        write_json(target_facts(Path(self.work), rank), facts)
        yield from ()

    def _blocks(self, target: Target, dtype: np.dtype[Any], beat: Beat) -> Iterator[NDArray[np.unsignedinteger]]:
        size = max(1, _BLOCK_BYTES // (self.length * dtype.itemsize))
        for start in range(target.start, target.end, size):
            end = min(start + size, target.end)
            block = np.empty((end - start, self.length), dtype)
            filled = 0
            for run in range(self.runs):
                filled += self._take(Path(self.work), run, start, end, block)
            if filled != end - start:
                raise RuntimeError(f"{target.name}: {filled} of {end - start} sequences found from row {start}")
            beat(end - target.start)
            yield block

    def _take(self, work: Path, run: int, start: int, end: int, block: NDArray[np.unsignedinteger]) -> int:
        """Copy the rows start…end that a run holds to their places in the block; return how many there were."""
        rows = np.load(run_path(work, run, "rows.npy"), mmap_mode="r", allow_pickle=False)
        first, last = np.searchsorted(rows, (start, end)).tolist()
        if first == last:
            return 0
        part = np.empty((last - first, self.length), block.dtype)
        with open(run_path(work, run, "ids"), "rb", buffering=0) as file:
            file.seek(first * self.length * block.itemsize)
            _read_exactly(file, part)
        block[np.asarray(rows[first:last]) - start] = part
        return last - first


def target_facts(work: Path, rank: int) -> Path:
    """Return where a written target's root and hashes stand."""
    return work / "targets" / f"{rank:06d}.json"
