"""Import of LLM360's Amber chunks: ``train_000.jsonl``… with lines ``{"token_ids": [2049 ids], "source": "c4"}``.

Chunk k is file k in its own order, each line a row and, in the ledger, a document of its own; labels are stored, one byte
a row. ``holdout_SOURCE.jsonl`` is a source's hold-out in the same format. What was exported and imported again has the
same rows, labels, hold-out and root.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.archives import open_lines
from mobillama.data.dataset import FORMAT, GIVEN, PREPARATION_NAME
from mobillama.data.documents import JSON_SUFFIXES
from mobillama.data.ledger import DOCUMENT, KEPT
from mobillama.data.store import write_array, write_sequences
from mobillama.data.tokenizer import (
    Tokenizer,
    id_type,
    load_tokenizer,
    save_tokenizer,
    token_lengths,
    tokenizer_digest,
)
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import SourceConfig
from mobillama.record.environment import environment
from mobillama.record.files import new_directory, sha256_file, write_json
from mobillama.record.manifest import write_manifest
from mobillama.record.merkle import merkle_root

if TYPE_CHECKING:
    from mobillama.data.prepare.stages import Progress

_IDS_AT_ONCE = 1 << 21
_LINE_BYTES = 64 << 20  # far beyond any sequence: what is longer is no file of lines
_MAX_SOURCES = 255

_CHUNK = re.compile(r"train_(\d+)\.jsonl(\.gz|\.xz|\.zst)?")
_HOLDOUT = re.compile(r"holdout_(.+)\.jsonl(\.gz|\.xz|\.zst)?")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # the names that a recipe's sources may have: they become file names

# What is kept of a line besides its ids: its source's index, and half the sha256 of its bytes (line feed included).
_LINE = np.dtype([("label", "u1"), ("digest", "u1", (16,))])


def import_amber(path: Path, tokenizer: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Make a data set of a folder of Amber's files, in the order they have, and return its manifest.

    Chunks come in the order of the files' numbers, sources in the order their labels first appear. The manifest is a
    prepared one's with ``"order": "given"``; its seed, under which training reads front to back, is 0.

    Args:
        path: a folder of ``train_NNN.jsonl`` and perhaps ``holdout_SOURCE.jsonl``, also .gz, .xz or .zst.
        tokenizer: the tokenizer that made the ids.
        out: the data directory to make; it appears when all is written.
        progress: told (stage, done, total).

    Raises:
        UsageError: there are no such files, or other ones among them; no tokenizer is there, or another one lies in
            ``path/tokenizer``; ``out`` exists.
        CorruptDataError: a line is none of Amber's, has another length than the first or ids that the tokenizer has not,
            or an archive is damaged; file and line are named.
    """
    loaded = load_tokenizer(tokenizer)
    beside = path / "tokenizer"  # where an export keeps it
    if beside.is_dir() and tokenizer_digest(load_tokenizer(beside)) != tokenizer_digest(loaded):
        raise UsageError(f"--tokenizer: {tokenizer} is not the one that made {path}; use {beside}")
    chunks, holdouts = _find_files(path)
    with new_directory(out) as work:
        manifest = _Import(work, loaded, chunks, holdouts, progress).run()
        write_json(
            work / PREPARATION_NAME,
            {
                "note": "How and where this was made; nothing here changes what was made.",
                "environment": environment(),
                "tokenizer": str(tokenizer.absolute()),
                "paths": {source["name"]: str(path.absolute()) for source in manifest["sources"]},
            },
        )
    return manifest


@dataclass(frozen=True)
class _Found:
    """A file to import; ``held`` is the source whose hold-out it is, ``""`` for a chunk."""

    path: Path
    held: str = ""


def _find_files(path: Path) -> tuple[list[_Found], list[_Found]]:
    """Return the chunks by number and the hold-outs by source.

    Raises:
        UsageError: there are no chunks, one of them twice, or other JSON lines among them.
        CorruptDataError: a chunk between others is missing.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: is no directory; name the one that holds Amber's train_000.jsonl …")
    chunks: dict[int, Path] = {}
    holdouts: dict[str, Path] = {}
    for file in sorted(file for file in path.iterdir() if file.name.endswith(JSON_SUFFIXES)):
        chunk, holdout = _CHUNK.fullmatch(file.name), _HOLDOUT.fullmatch(file.name)
        if chunk:
            before = chunks.setdefault(int(chunk[1]), file)
        elif holdout:
            before = holdouts.setdefault(holdout[1], file)
        else:
            raise UsageError(f"{file}: is neither train_NNN.jsonl nor holdout_SOURCE.jsonl; move it elsewhere")
        if before != file:
            raise UsageError(f"{file}: is the same part as {before.name}; remove one of them")
    if not chunks:
        raise UsageError(f"{path}: holds no train_NNN.jsonl (nor .gz, .xz, .zst); name the directory that holds them")
    missing = next((n for n, found in enumerate(sorted(chunks), min(chunks)) if n != found), None)
    if missing is not None:
        raise CorruptDataError(
            f"{path}: chunk {missing} is not there, but later ones are; fetch train_{missing:03d}.jsonl"
        )
    return [_Found(chunks[n]) for n in sorted(chunks)], [_Found(holdouts[n], n) for n in sorted(holdouts)]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, from 1, each with its number.

    Raises:
        CorruptDataError: an archive is damaged, or a line has no end.
    """
    number = 0
    with open_lines(path) as lines:
        while True:
            number += 1
            try:
                line = lines.readline(_LINE_BYTES)
            except Exception as error:  # each kind of archive raises errors of its own
                said = f"{path}:{number}: damaged or truncated archive ({error}); fetch it again"
                raise CorruptDataError(said) from None
            if not line:
                return
            if len(line) == _LINE_BYTES:
                raise CorruptDataError(
                    f"{path}:{number}: a line of more than {_LINE_BYTES} bytes; fetch the file again"
                )
            yield number, line


def _parse(line: bytes, place: str) -> tuple[list[int], str]:
    """Return the ids and the label of a line.

    Raises:
        CorruptDataError: it is no line of Amber's.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = f"not valid JSON ({getattr(error, 'msg', error)}); fetch the file again or remove the line"
        raise CorruptDataError(f"{place}: {said}") from None
    if isinstance(row, dict) and row.keys() == {"token_ids", "source"}:
        ids, label = row["token_ids"], row["source"]
        # True and 1.0 equal 1, but are no ids.
        if isinstance(ids, list) and set(map(type, ids)) == {int} and isinstance(label, str):
            return ids, label
    wanted = '{"token_ids": [integers], "source": "label"} and nothing else'
    raise CorruptDataError(f"{place}: is not {wanted}; mend or remove the line")


class _Import:
    """One import: counts the lines first, since an array's header states its rows, then writes chunk after chunk."""

    def __init__(
        self, work: Path, tokenizer: Tokenizer, chunks: list[_Found], holdouts: list[_Found], progress: Progress
    ) -> None:
        self.work, self.tokenizer, self.progress = work, tokenizer, progress
        self.files, self.chunks = [*chunks, *holdouts], len(chunks)
        self.dtype, self.lengths = id_type(tokenizer.vocab_size), token_lengths(tokenizer)
        self.names: list[str] = []  # of the sources, as their labels appear
        self.rows: list[int] = []  # lines of each file
        self.counts = np.zeros((len(self.files), _MAX_SOURCES), np.int64)  # lines of each file with each label
        self.text_bytes = np.zeros(_MAX_SOURCES, np.int64)  # that each source's ids stand for
        self.facts: dict[str, dict[str, Any]] = {}  # bytes and sha256 of what is written
        self.done = 0

    def run(self) -> dict[str, Any]:
        """Read and write everything; return the manifest."""
        for name in ("train", "labels", "holdout", "documents", "lines"):
            (self.work / name).mkdir()
        described = self._survey()
        self.length = self._first_length()
        chunks = [self._chunk(number) for number in range(self.chunks)]
        holdout = self._holdout()
        tables = [self._table(source) for source in range(len(self.names))]
        shutil.rmtree(self.work / "lines")
        save_tokenizer(self.tokenizer, self.work / "tokenizer")
        return write_manifest(
            self.work,
            {
                "format": FORMAT,
                "order": GIVEN,
                "inputs": self._inputs(described),
                "dtype": self.dtype.str,
                "sources": [self._source(source) for source in range(len(self.names))],
                "verdicts": [KEPT],
                "train_sequences": sum(chunk["rows"] for chunk in chunks),
                "corpus_root": merkle_root(tables).hex(),
                "root": merkle_root([bytes.fromhex(chunk["root"]) for chunk in chunks]).hex(),
                "chunks": chunks,
                "holdout": holdout,
            },
            self.facts,
        )

    def _survey(self) -> list[dict[str, Any]]:
        """Count every file's lines; return name, bytes and sha256 of each."""
        described = []
        for number, file in enumerate(self.files):
            self.progress("count lines", number, len(self.files))
            self.rows.append(sum(1 for _ in _lines(file.path)))
            size = file.path.stat().st_size
            described.append({"name": file.path.name, "bytes": size, "sha256": sha256_file(file.path)})
        self.progress("count lines", len(self.files), len(self.files))
        return described

    def _first_length(self) -> int:
        """Return the length of the first training sequence, which all others must have."""
        for file, rows in zip(self.files[: self.chunks], self.rows, strict=False):
            if rows:
                ids, _ = _parse(next(_lines(file.path))[1], f"{file.path}:1")
                if len(ids) < 2:
                    raise CorruptDataError(f"{file.path}:1: a sequence of one id teaches nothing; remove such lines")
                return len(ids)
        raise UsageError(f"{self.files[0].path.parent}: its train_NNN.jsonl hold no line; nothing is left to train on")

    def _chunk(self, number: int) -> dict[str, Any]:
        """Write a chunk and its labels; return its entry of the manifest."""
        entry = self._write(f"train/chunk-{number:05d}.npy", number)
        name, labels = f"labels/chunk-{number:05d}.npy", self._kept(number)["label"]
        self.facts[name] = write_array(self.work / name, labels.shape, labels.dtype, [labels.tobytes()])
        rows_of_source = {
            source: int(rows) for source, rows in zip(self.names, self.counts[number], strict=False) if rows
        }
        return {**entry, "labels": name, "rows_of_source": rows_of_source}

    def _holdout(self) -> list[dict[str, Any]]:
        """Write the hold-out of every source; return the entries of the manifest."""
        held = {file.held: number for number, file in enumerate(self.files) if file.held and self.rows[number]}
        entries = {name: self._write(f"holdout/{name}.npy", number) for name, number in held.items()}
        return [{**(entries.get(name) or self._write(f"holdout/{name}.npy")), "source": name} for name in self.names]

    def _write(self, name: str, number: int | None = None) -> dict[str, Any]:
        """Write a sequence file from a file of lines, or an empty one; return its entry of the manifest."""
        shape = (0 if number is None else self.rows[number], self.length)
        blocks = iter(()) if number is None else self._blocks(number)
        root, facts = write_sequences(self.work / name, shape, self.dtype, blocks)
        folder = name.split("/")[0]
        self.facts |= {f"{folder}/{file}": fact for file, fact in facts.items()}
        return {"file": name, "rows": shape[0], "root": root.hex()}

    def _blocks(self, number: int) -> Iterator[NDArray[np.unsignedinteger]]:
        """Yield the ids of a file's lines, block by block; keep their labels and digests in ``lines/``."""
        file, lines = self.files[number], _lines(self.files[number].path)
        left = self.rows[number]
        with open(self.work / "lines" / str(number), "wb") as kept:
            while batch := list(itertools.islice(lines, max(1, _IDS_AT_ONCE // self.length))):
                left -= len(batch)
                if left < 0:
                    break
                block, records = np.empty((len(batch), self.length), self.dtype), np.empty(len(batch), _LINE)
                for row, record, (line_number, line) in zip(block, records, batch, strict=True):
                    place = f"{file.path}:{line_number}"
                    ids, label = _parse(line, place)
                    row[:] = self._checked(ids, place)
                    record["label"] = self._source_index(label, file.held, place)
                    record["digest"] = np.frombuffer(hashlib.sha256(line).digest()[:16], np.uint8)
                kept.write(records.tobytes())
                self.counts[number] += np.bincount(records["label"], minlength=_MAX_SOURCES)
                np.add.at(self.text_bytes, records["label"], self.lengths[block].sum(1))
                self.done += len(batch)
                self.progress("import", self.done, sum(self.rows))
                yield block
        if left:
            raise CorruptDataError(f"{file.path}: changed while it was read; import it again")

    def _checked(self, ids: list[int], place: str) -> NDArray[np.uint32]:
        """Return the ids of a line, or refuse them."""
        if len(ids) != self.length:
            raise CorruptDataError(
                f"{place}: {len(ids)} ids, the first line has {self.length}; mend or remove the line"
            )
        try:
            values = np.frombuffer(array("I", ids), np.uint32)
            if values.max() < self.tokenizer.vocab_size:
                return values
        except OverflowError:  # negative, or beyond 32 bits
            pass
        size = self.tokenizer.vocab_size
        raise CorruptDataError(f"{place}: ids outside the tokenizer's {size}; name the tokenizer that made them")

    def _source_index(self, label: str, held: str, place: str) -> int:
        """Return the index of a label, giving it one when it is new."""
        if held and label != held:
            raise CorruptDataError(
                f"{place}: source '{label}' in the hold-out of '{held}'; move the line to its own file"
            )
        if label in self.names:
            return self.names.index(label)
        if not _LABEL.fullmatch(label) or label == "duplicates":  # the table of duplicates has that name
            raise CorruptDataError(f"{place}: source {label!r} is no name of letters, digits, '-' and '_'; rename it")
        if len(self.names) == _MAX_SOURCES:
            raise CorruptDataError(f"{place}: source '{label}' is one more than {_MAX_SOURCES}; join some of them")
        self.names.append(label)
        return len(self.names) - 1

    def _kept(self, number: int) -> NDArray[np.void]:
        """Return label and digest of each line of a file that was read."""
        return np.fromfile(self.work / "lines" / str(number), _LINE)

    def _files_of(self, source: int) -> list[int]:
        """Return the files that hold lines of a source; the ledger's files are places in this list."""
        return np.flatnonzero(self.counts[:, source]).tolist()

    def _table(self, source: int) -> bytes:
        """Write a source's table of documents, which are its lines; return its sha256."""
        name = f"documents/{self.names[source]}.npy"
        shape = (int(self.counts[:, source].sum()),)
        self.facts[name] = write_array(self.work / name, shape, DOCUMENT, self._table_blocks(source))
        return bytes.fromhex(self.facts[name]["sha256"])

    def _table_blocks(self, source: int) -> Iterator[bytes]:
        done = 0
        for place, number in enumerate(self._files_of(source)):
            records = self._kept(number)
            lines = np.flatnonzero(records["label"] == source)
            rows = np.zeros(len(lines), DOCUMENT)
            rows["end"] = (done + 1 + np.arange(len(lines))) * self.length
            rows["file"], rows["line"], rows["digest"] = place, lines + 1, records["digest"][lines]
            done += len(lines)
            yield rows.tobytes()

    def _source(self, source: int) -> dict[str, Any]:
        """Return the manifest's counts of a source."""
        trained, held = (int(part.sum()) for part in np.split(self.counts[:, source], [self.chunks]))
        return {
            "name": self.names[source],
            "documents": trained + held,
            "kept_documents": trained + held,
            "bytes": int(self.text_bytes[source]),
            "tokens": (trained + held) * self.length,
            "verdicts": {},
            "sequences": trained + held,
            "holdout_sequences": held,
            "dealt_sequences": trained,
            "dropped_tokens": 0,
        }

    def _inputs(self, described: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what decided the outcome, as of a preparation whose sources are these labels of these files."""
        sources = []
        for source, name in enumerate(self.names):
            settings = asdict(SourceConfig("", format="amber", subset=name))
            del settings["path"]
            files = [described[number] for number in self._files_of(source)]
            sources.append({"name": name, **settings, "files": files})
        return {
            "sequence_length": self.length,
            "chunks": self.chunks,
            "seed": 0,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "tokenizer_file": sha256_file(self.tokenizer.path),
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "sources": sources,
        }
