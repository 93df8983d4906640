"""Export to LLM360's Amber chunks: ``train_000.jsonl``… with lines ``{"token_ids": [2049 ids], "source": "c4"}``.

Lines stand in training order; ``holdout_SOURCE.jsonl`` is a source's hold-out in the same format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mobillama.data.dataset import Dataset
from mobillama.data.tokenizer import save_tokenizer
from mobillama.record.files import new_directory

if TYPE_CHECKING:
    from mobillama.data.prepare.stages import Progress

_IDS_AT_ONCE = 1 << 21


def export_amber(dataset: Dataset, out: Path, progress: Progress) -> int:
    """Write a data set as Amber's files and return the number of sequences written, held-out ones included.

    ``train_NNN.jsonl`` is a chunk, ``holdout_SOURCE.jsonl`` what is held out of a source (none where nothing is), and
    ``tokenizer/`` the tokenizer. ``out`` appears when all is written.

    Args:
        dataset: a prepared or imported data set.
        out: the directory to make.
        progress: told (stage, sequences done, all sequences).

    Raises:
        UsageError: ``out`` exists.
        CorruptDataError: a sequence differs from what was prepared.
    """
    manifest = dataset.manifest
    digits = max(3, len(str(len(manifest["chunks"]) - 1)))
    total = dataset.size + sum(entry["rows"] for entry in manifest["holdout"])
    lines, at_once = _LineWriter(dataset), max(1, _IDS_AT_ONCE // dataset.sequence_length)
    done = first = 0
    with new_directory(out) as work:
        save_tokenizer(dataset.tokenizer, work / "tokenizer")
        for number, chunk in enumerate(manifest["chunks"]):
            last = first + chunk["rows"]
            with open(work / f"train_{number:0{digits}d}.jsonl", "wb") as file:
                for start in range(first, last, at_once):
                    rows = np.arange(start, min(start + at_once, last))
                    file.write(lines(dataset.read(rows), dataset.layout.source_of(rows)))
                    done += len(rows)
                    progress("export", done, total)
            first = last
        for entry in manifest["holdout"]:
            if not entry["rows"]:
                continue
            index = dataset.source_names.index(entry["source"])
            with open(work / f"holdout_{entry['source']}.jsonl", "wb") as file:
                for start in range(0, entry["rows"], at_once):
                    ids = dataset.holdout(entry["source"], at_once, start)
                    file.write(lines(ids, np.full(len(ids), index)))
                    done += len(ids)
                    progress("export", done, total)
    return done


class _LineWriter:
    """Writes rows as ``json.dumps`` would, looking up the digits of each id instead of making them."""

    def __init__(self, dataset: Dataset) -> None:
        self._digits = np.array([b"%d" % number for number in range(dataset.vocab_size)], dtype=object)
        self._ends = [b'], "source": %s}\n' % json.dumps(name).encode() for name in dataset.source_names]

    def __call__(self, ids: NDArray[np.int64], sources: NDArray[np.int64]) -> bytes:
        """Return the lines of rows: ids (n, sequence length), source indices (n,)."""
        parts = []
        for row, source in zip(ids, sources.tolist(), strict=True):
            parts += [b'{"token_ids": [', b", ".join(self._digits[row].tolist()), self._ends[source]]
        return b"".join(parts)
