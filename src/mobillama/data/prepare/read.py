"""Reading stage: raw documents → cleaned → ids on disk, and a record of every document, kept or not."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as Kept
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from mobillama.data.documents import Document, Reading, count_lines, read_piece
from mobillama.data.ledger import KEPT
from mobillama.data.prepare.clean import Cleaner
from mobillama.data.prepare.plan import ReadTask
from mobillama.data.prepare.stages import Beat
from mobillama.data.tokenizer import Tokenizer, id_type, load_tokenizer, token_lengths
from mobillama.recipe import PrepareRecipe
from mobillama.record.files import write_json

STAGE = "read and tokenise"

# Of a document within its task: where its ids end in the task's file, its piece's file and its line in the piece, half
# the sha256 of its raw bytes and of its cleaned text, its verdict (an index into the task's own list).
RECORD = np.dtype(
    [
        ("end", "<u8"),
        ("file", "<u4"),
        ("line", "<u4"),
        ("digest", "u1", (16,)),
        ("cleaned", "u1", (16,)),
        ("verdict", "u1"),
    ]
)

_DOCUMENTS_AT_ONCE = 512
_BYTES_AT_ONCE = 4 << 20


def ids_path(work: Path, task: int) -> Path:
    """Return where a task's ids stand."""
    return work / "read" / f"{task:06d}.ids"


def records_path(work: Path, task: int) -> Path:
    """Return where the records of a task's documents stand."""
    return work / "read" / f"{task:06d}.records"


def facts_path(work: Path, task: int) -> Path:
    """Return where a task's counts stand."""
    return work / "read" / f"{task:06d}.json"


def load_records(work: Path, task: int) -> NDArray[np.void]:
    """Return a task's records, memory-mapped."""
    path = records_path(work, task)
    if not path.stat().st_size:
        return np.empty(0, RECORD)
    return np.memmap(path, RECORD, mode="r")


class Read(PipelineStep):
    """Reads, cleans and tokenises the documents of a task; hands on the kept ones where near duplicates are looked for.

    Args:
        work: the preparation's working directory.
        recipe: the preparation.
        tasks: all tasks of the stage.
        readings: how each source is read.
    """

    name = "read and tokenise"
    type = "MobiLlama"

    def __init__(self, work: Path, recipe: PrepareRecipe, tasks: list[ReadTask], readings: list[Reading]) -> None:
        super().__init__()
        self.work, self.recipe, self.tasks, self.readings = str(work), recipe, tasks, readings
        self.tokenizer = str(Path(recipe.tokenizer).absolute())

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Kept]:
        """Do task ``rank``."""
        task, work = self.tasks[rank], Path(self.work)
        source = list(self.recipe.sources.values())[task.source]
        tokenizer = load_tokenizer(Path(self.tokenizer))
        encoder = Encoder(tokenizer, Cleaner(source.clean))
        beat = Beat(self.work, STAGE, rank)
        ids_file, records_file = ids_path(work, rank), records_path(work, rank)
        with open(ids_file, "wb") as ids, open(records_file, "wb") as records:
            for batch, done in self._batches(task, self.readings[task.source]):
                packed, table, texts = encoder.encode(batch)
                ids.write(packed)
                records.write(table.tobytes())
                beat(done)
                if source.clean.near_duplicates:
                    yield from (Kept(text=text, id="") for text in texts)
            for file in (ids, records):
                file.flush()
                os.fsync(file.fileno())
        write_json(
            facts_path(work, rank),
            {
                "documents": encoder.documents,
                "bytes": encoder.bytes,
                "tokens": encoder.tokens,
                "verdicts": encoder.verdicts,
                "lines": [0 if piece.end is None else count_lines(piece) for piece in task.pieces],
            },
        )

    def _batches(self, task: ReadTask, reading: Reading) -> Iterator[tuple[list[Document], float]]:
        batch: list[Document] = []
        size, done = 0, 0.0
        share = task.bytes / len(task.pieces)
        for piece in task.pieces:
            for document in read_piece(piece, reading):
                batch.append(document)
                size += len(document.raw)
                if len(batch) == _DOCUMENTS_AT_ONCE or size > _BYTES_AT_ONCE:
                    yield batch, done
                    batch, size = [], 0
            done += share
        if batch:
            yield batch, done


class Encoder:
    """Cleans and encodes batches of documents, and counts what it keeps."""

    def __init__(self, tokenizer: Tokenizer, cleaner: Cleaner) -> None:
        self._tokenizer, self._cleaner = tokenizer, cleaner
        self._dtype = id_type(tokenizer.vocab_size)
        self._end_mark = np.array([tokenizer.eos_id], self._dtype).tobytes()
        self.verdicts = [KEPT]
        self.documents = self.tokens = self.bytes = 0

    def encode(self, batch: list[Document]) -> tuple[bytes, NDArray[np.void], list[str]]:
        """Return the ids of the kept documents, the record of every document, and the kept texts."""
        cleaned = [self._clean(document) for document in batch]
        kept = [text for text, verdict in cleaned if verdict == KEPT]
        encoded = iter(self._tokenizer.encode_packed(kept))
        table = np.zeros(len(batch), RECORD)
        packed: list[bytes] = []
        for row, document, (text, verdict) in zip(table, batch, cleaned, strict=True):
            raw = text.encode("utf-8")
            if verdict == KEPT:
                ids = next(encoded) + self._end_mark
                if document.ids is not None:  # a ready sequence has its end marks within
                    ids = np.array(document.ids, self._dtype).tobytes()
                    raw = document.raw
                    self.bytes += int(self._lengths[document.ids].sum())
                else:
                    self.bytes += len(raw)
                packed.append(ids)
                self.tokens += len(ids) // self._dtype.itemsize
            row["end"], row["file"], row["line"] = self.tokens, document.file, document.line
            row["digest"] = _half(document.raw)
            row["cleaned"] = row["digest"] if raw == document.raw else _half(raw)
            row["verdict"] = self._code(verdict)
        self.documents += len(batch)
        return b"".join(packed), table, kept

    def _clean(self, document: Document) -> tuple[str, str]:
        if document.ids is not None:
            return "", KEPT
        if document.fault:
            return "", document.fault
        text, rule = self._cleaner(document.text)
        return text, rule or KEPT

    @functools.cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return token_lengths(self._tokenizer)

    def _code(self, verdict: str) -> int:
        if verdict not in self.verdicts:
            self.verdicts.append(verdict)
        return self.verdicts.index(verdict)


def _half(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(raw).digest()[:16], np.uint8)


def load_facts(work: Path, tasks: int) -> list[dict[str, Any]]:
    """Return the counts of all tasks."""
    return [json.loads(facts_path(work, task).read_text()) for task in range(tasks)]


def first_lines(tasks: list[ReadTask], facts: list[dict[str, Any]]) -> list[dict[int, int]]:
    """Return for each task what to add to the lines of each file: the lines of the parts of that file before it."""
    before: Counter[tuple[int, int]] = Counter()
    out = []
    for task, fact in zip(tasks, facts, strict=True):
        out.append({piece.file: before[task.source, piece.file] for piece in task.pieces})
        for piece, lines in zip(task.pieces, fact["lines"], strict=True):
            before[task.source, piece.file] += lines
    return out
