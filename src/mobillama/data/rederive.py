"""Deep verification: make stored sequences anew from the raw documents that the ledger names, and compare every id."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mobillama.data.dataset import PREPARATION_NAME, Dataset
from mobillama.data.documents import Document, Piece, Reading, format_of, hub_address, read_piece
from mobillama.data.order import Permutation
from mobillama.errors import UsageError, VerificationError
from mobillama.recipe import CleanConfig, SourceConfig
from mobillama.record.files import read_json

if TYPE_CHECKING:
    from mobillama.data.prepare.clean import Cleaner
    from mobillama.data.prepare.stages import Progress

_DOCUMENTS_AT_ONCE = 512
_TEXT_AT_ONCE = 4 << 20
_CAUSES = (
    "the data were changed, or prepared with other versions of the packages (see preparation.json); make them again"
)


def sample_rows(dataset: Dataset, count: int, seed: int) -> NDArray[np.int64]:
    """Return ``count`` different stored training rows, or all where there are fewer, in rising order.

    The same data set, count and seed give the same rows.
    """
    chosen = Permutation(dataset.root + f"/verify/{seed}".encode(), dataset.size)(np.arange(min(count, dataset.size)))
    return np.sort(chosen)


@dataclass(frozen=True)
class _RawFile:
    """A raw file and how it is read. Sources that differ by their label alone share it."""

    path: str
    file: int
    reading: Reading


@dataclass(frozen=True)
class _Part:
    """Positions start…end of a stored row: ids of a document with ``tokens`` ids, from ``offset`` on."""

    source: int
    row: int
    start: int
    end: int
    offset: int
    tokens: int


@dataclass(frozen=True)
class _Found:
    """A raw document that was read again, its file and line for people, and the parts of rows that it must give."""

    place: str
    document: Document
    parts: list[_Part]


# What is wanted of a raw file: by line and digest, since the parts of a long document share their line.
_Lines = dict[int, dict[str, list[_Part]]]


def rederive(dataset: Dataset, rows: NDArray[np.int64], sources: Mapping[str, Path], progress: Progress) -> int:
    """Make stored training rows anew from the raw documents that the ledger names, and compare every id.

    Each raw file that holds such a document is read once, front to back, as far as the last of them. A batch of
    documents is in memory at a time, and a note of each document that is wanted.

    Args:
        dataset: a prepared or imported data set.
        rows: stored training rows (n,).
        sources: where raw files are now, by source: a file or directory as in the recipe (or a hub data set). For other
            sources preparation.json states where they were; a relative path starts at the working directory.
        progress: told (stage, documents done, documents in all).

    Returns:
        The number of rows.

    Raises:
        UsageError: a raw file is not there.
        VerificationError: a raw document is not the one that was prepared, or it gives other ids than are stored; its
            file and line are named.
        CorruptDataError: a raw file cannot be read, or a stored one is damaged.
    """
    wanted = _wanted(dataset, rows, sources)
    total, done = sum(len(digests) for lines in wanted.values() for digests in lines.values()), 0
    progress("make anew", done, total)
    cleaner = functools.cache(functools.partial(_cleaner, dataset))
    for batch in _batches(wanted):
        _compare(dataset, batch, cleaner)
        done += len(batch)
        progress("make anew", done, total)
    return len(rows)


def _wanted(dataset: Dataset, rows: NDArray[np.int64], sources: Mapping[str, Path]) -> dict[_RawFile, _Lines]:
    """Return which documents are needed of which raw files.

    Raises:
        UsageError: a raw file is not there.
        VerificationError: the ledger does not tell of which documents a row is made.
    """
    wanted: dict[_RawFile, _Lines] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    raw_file = functools.cache(lambda source, name: _raw_file(dataset, source, name, sources))
    origins = (part.tolist() for part in dataset.layout.train_origin(rows))
    for row, source, sequence in zip(rows.tolist(), *origins, strict=True):
        first = sequence * dataset.sequence_length
        spans = dataset.spans_of(source, sequence)
        borders = [0, *(span.start for span in spans[1:]), dataset.sequence_length]
        if [(span.start, span.end) for span in spans] != list(pairwise(borders)):
            table = dataset.path / "documents" / f"{dataset.source_names[source]}.npy"
            raise VerificationError(f"{table}: has no documents for all of stored row {row}; make the data again")
        for span in spans:
            start = dataset.ledger.start(source, span.document)
            tokens = dataset.ledger.start(source, span.document + 1) - start
            part = _Part(source, row, span.start, span.end, first + span.start - start, tokens)
            wanted[raw_file(source, span.file)][span.line][span.digest].append(part)
    return wanted


def _raw_file(dataset: Dataset, source: int, name: str, sources: Mapping[str, Path]) -> _RawFile:
    """Return where a source's raw file is and how it was read.

    Raises:
        UsageError: it is not there.
    """
    inputs = dataset.manifest["inputs"]
    settings, label = inputs["sources"][source], dataset.source_names[source]
    names = [file["name"] for file in settings["files"]]
    reading = Reading(
        format=format_of(Path(name)) if settings["format"] == "auto" else settings["format"],
        text_field=settings["text_field"],
        sequence_length=inputs["sequence_length"],
        vocab_size=inputs["vocab_size"],
        max_bytes=inputs.get("max_document_bytes", Reading.max_bytes),  # an import has none of these two
        split_long=inputs.get("long_documents") == "split",
        skip_bad=True,  # what is bad now and is wanted is no longer what was prepared
    )
    if settings["format"] == "huggingface":
        kept = {key: settings[key] for key in ("format", "subset", "split", "revision")}
        hub = SourceConfig(str(sources.get(label, settings["path"])), **kept)
        return _RawFile(hub_address(hub, len(names)), names.index(name), reading)
    place = sources.get(label) or read_json(dataset.path / PREPARATION_NAME).get("paths", {}).get(label, "")
    path = Path(place) / name if Path(place).is_dir() else Path(place)
    if not path.is_file():
        said = f"{path}: is not there; source '{label}' was prepared from it: name its place with --source {label}=PATH"
        raise UsageError(said)
    return _RawFile(str(path), 0, reading)


def _batches(wanted: dict[_RawFile, _Lines]) -> Iterator[list[_Found]]:
    """Yield the wanted documents of all raw files, some at a time."""
    batch: list[_Found] = []
    size = 0
    for raw in sorted(wanted, key=lambda raw: (raw.path, raw.file)):
        for found in _read_again(raw, wanted[raw]):
            batch.append(found)
            size += len(found.document.raw)
            if len(batch) == _DOCUMENTS_AT_ONCE or size > _TEXT_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _read_again(raw: _RawFile, lines: _Lines) -> Iterator[_Found]:
    """Yield the wanted documents of a raw file, and read no further than the last of them.

    Raises:
        VerificationError: a document is not where it was, or not what it was.
    """
    last, waiting = max(lines), sum(len(digests) for digests in lines.values())
    for document in read_piece(Piece(raw.path, raw.file), raw.reading):
        if document.line > last:
            break
        if document.line in lines:
            parts = lines[document.line].pop(hashlib.sha256(document.raw).hexdigest()[:32], None)
            if parts is not None:
                yield _Found(f"{raw.path}:{document.line}", document, parts)
                waiting -= 1
                if not waiting:
                    return
    first = min(line for line, digests in lines.items() if digests)
    raise VerificationError(
        f"{raw.path}:{first}: is not the document that was prepared (another sha256); bring back the raw file as it was"
    )


def _cleaner(dataset: Dataset, source: int) -> Cleaner:
    from mobillama.data.prepare.clean import Cleaner

    return Cleaner(CleanConfig(**dataset.manifest["inputs"]["sources"][source]["clean"]))


def _compare(dataset: Dataset, batch: list[_Found], cleaner: Callable[[int], Cleaner]) -> None:
    """Clean and tokenise documents as they were, and compare their ids with the stored rows.

    Raises:
        VerificationError: a document gives other ids.
        CorruptDataError: a stored row is damaged.
    """
    # Keys are a place in the batch and a source, since sources may share a raw file.
    made: dict[tuple[int, int], NDArray[np.integer]] = {}
    texts: dict[tuple[int, int], str] = {}
    for number, found in enumerate(batch):
        for source in {part.source for part in found.parts}:
            if found.document.ids is not None:
                made[number, source] = _ready_ids(dataset, found, source)
            else:
                texts[number, source] = _clean(dataset, found, source, cleaner)
    end_mark = dataset.manifest["inputs"]["eos_id"]
    for key, packed in zip(texts, dataset.tokenizer.encode_packed(list(texts.values())), strict=True):
        made[key] = np.append(np.frombuffer(packed, dataset.manifest["dtype"]), end_mark)
    rows = np.unique([part.row for found in batch for part in found.parts])
    stored = dict(zip(rows.tolist(), dataset.read(rows), strict=True))
    for number, found in enumerate(batch):
        for part in found.parts:
            ids = made[number, part.source]
            expected = ids[part.offset : part.offset + part.end - part.start]
            if len(ids) != part.tokens or not np.array_equal(expected, stored[part.row][part.start : part.end]):
                raise VerificationError(
                    f"{found.place}: gives other ids than stored row {part.row} has at {part.start}…{part.end}; {_CAUSES}"
                )


def _clean(dataset: Dataset, found: _Found, source: int, cleaner: Callable[[int], Cleaner]) -> str:
    text, rule = cleaner(source)(found.document.text)
    rule = found.document.fault or rule
    if rule:
        label = dataset.source_names[source]
        raise VerificationError(f"{found.place}: was kept in source '{label}', but is dropped now ({rule}); {_CAUSES}")
    return text


def _ready_ids(dataset: Dataset, found: _Found, source: int) -> NDArray[np.integer]:
    wanted = dataset.manifest["inputs"]["sources"][source]["subset"]
    if wanted not in ("", found.document.label):
        said = f"is a sequence of '{found.document.label}', not of '{wanted}'"
        raise VerificationError(f"{found.place}: {said}; {_CAUSES}")
    return np.array(found.document.ids)
