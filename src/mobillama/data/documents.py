"""Raw documents, read one by one with bounded memory, each with its place of origin.

A document is known by its file and its line (JSON lines), row (Parquet, a hub's data set) or 1 (a text file); lines and
rows count from 1. What cannot be read is either an error that names the place or, by policy, a document with a fault.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mobillama.data.archives import ARCHIVE_ERRORS, BLOCK_BYTES, COMPRESSED, open_lines
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import SourceConfig

# Plain .json is left to those who ask for it (format: jsonl): it is often one object of settings.
JSON_SUFFIXES = (
    *(f".{name}{archive}" for name in ("jsonl", "ndjson") for archive in ("", *COMPRESSED)),
    *(f".json{archive}" for archive in COMPRESSED),
)
SUFFIXES = {"jsonl": JSON_SUFFIXES, "amber": JSON_SUFFIXES, "parquet": (".parquet",), "text": (".txt",)}
ALL_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".txt")

# A character of JSON takes at most six times its bytes of UTF-8 (\\u0001).
_JSON_GROWTH = 6


@dataclass(frozen=True)
class Reading:
    """How the documents of a source are read."""

    format: str = "auto"
    text_field: str = "text"
    label: str = ""
    sequence_length: int = 0
    vocab_size: int = 0
    max_bytes: int = 1 << 62
    split_long: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class Document:
    """One document: its text and UTF-8 bytes, file (an index) and line, or a fault instead of a text.

    ``ids`` and their label are given where the source is a file of ready sequences (LLM360's format).
    """

    text: str
    raw: bytes
    file: int
    line: int
    fault: str = ""
    ids: list[int] | None = None
    label: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read front to back: a file, bytes start…end of a file, or a hub data set's shard."""

    path: str
    file: int
    start: int = 0
    end: int | None = None


def source_files(source: SourceConfig, name: str) -> list[Path]:
    """Return the files of a source in the order they are read: its path itself, or the directory's files by name.

    Raises:
        UsageError: there is nothing to read; the message names the source.
    """
    path, suffixes = Path(source.path), SUFFIXES.get(source.format, ALL_SUFFIXES)
    key = f"sources.{name}.path"
    if path.is_file():
        if source.files:
            raise UsageError(f"sources.{name}.files: {path} is a file itself; remove 'files', or name its directory")
        if source.format == "auto" and not path.name.endswith(suffixes):
            raise UsageError(
                f"{key}: {path} is none of {', '.join(suffixes)}; set format: jsonl, parquet or text, whichever it is"
            )
        files = [path]
    elif not path.is_dir():
        raise UsageError(f"{key}: {path} does not exist")
    else:
        found = _found_below(path, source, name)
        files = sorted(file for file in found if _is_of(source, file))
        lost = sorted(file for file in found if file.is_symlink() and not file.exists())
        if lost:
            raise UsageError(f"{key}: {lost[0]} is a link to nothing; mend or remove it")
    if not files:
        wanted = source.files or f"*{' *'.join(suffixes)}"
        raise UsageError(f"{key}: {path} holds no file {wanted}; name others with 'files: \"**/*.py\"'")
    if source.format == "text" and any(file.name.endswith(COMPRESSED) for file in files):
        raise UsageError(f"{key}: {next(f for f in files if f.name.endswith(COMPRESSED))}: decompress texts first")
    return files


def _found_below(path: Path, source: SourceConfig, name: str) -> list[Path]:
    """Return what stands below a source's directory, or of it what the pattern of the source names."""

    def fail(error: OSError) -> None:
        said = f"{error.filename}: {error.strerror}; make it readable or take it out of the source's directory"
        raise UsageError(f"sources.{name}.path: {said}")

    # Path.glob passes over directories that it cannot read.
    below = [Path(where) / entry for where, *entries in os.walk(path, onerror=fail) for e in entries for entry in e]
    if not source.files:
        return below
    try:
        return list(path.glob(source.files))
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"sources.{name}.files: '{source.files}' is no pattern below {path} ({error})") from None


def _is_of(source: SourceConfig, file: Path) -> bool:
    """Tell whether a file below a source's directory belongs to it; an Amber folder's hold-out does not."""
    if source.files:
        return file.is_file()
    suffixes = SUFFIXES.get(source.format, ALL_SUFFIXES) + ((".json",) if source.format == "jsonl" else ())
    held_out = source.format == "amber" and file.name.startswith("holdout_")
    return file.name.endswith(suffixes) and not held_out and file.is_file()


def passed_over(source: SourceConfig) -> list[Path]:
    """Return what below a source's directory is not read: files of other kinds and linked directories, by name."""
    path = Path(source.path)
    if source.files or source.format == "huggingface" or not path.is_dir():
        return []
    found = _found_below(path, source, path.name)
    return sorted(f for f in found if (f.is_symlink() and f.is_dir()) or (f.is_file() and not _is_of(source, f)))


def read_texts(paths: list[Path]) -> Iterator[str]:
    """Yield the texts of files or directories of them, in order.

    Raises:
        UsageError: there is nothing to read.
        CorruptDataError: a file cannot be read.
    """
    for path in paths:
        yield from source_texts(SourceConfig(str(path)), path.name)


def source_texts(source: SourceConfig, name: str, skip_bad: bool = False) -> Iterator[str]:
    """Yield the texts of a source's files, in order, uncleaned.

    Raises:
        UsageError: there is nothing to read.
        CorruptDataError: a file cannot be read, or (unless ``skip_bad``) one of its documents.
    """
    reading = Reading(source.format, source.text_field, skip_bad=skip_bad)
    for file in source_files(source, name):
        documents = read_piece(Piece(str(file), 0), reading)
        yield from (document.text for document in documents if document.text and not document.fault)


def read_piece(piece: Piece, reading: Reading) -> Iterator[Document]:
    """Yield the documents of a piece in order; blank lines are none.

    Raises:
        CorruptDataError: an archive is damaged or truncated, or (unless they are skipped) a line is not a JSON object
            with a text, or a text is not UTF-8; file and line are named.
    """
    path = Path(piece.path)
    format = reading.format if reading.format != "auto" else format_of(path)
    readers: dict[str, Callable[[Path, Piece, Reading], Iterator[Document]]] = {
        "jsonl": _read_json_lines,
        "amber": _read_json_lines,
        "parquet": _read_parquet,
        "text": _read_text,
        "huggingface": _read_hub,
    }
    try:
        for document in readers[format](path, piece, reading):
            if document.fault and not reading.skip_bad and document.fault != "too_long":
                before = count_lines(Piece(piece.path, piece.file, 0, piece.start)) if piece.start else 0
                place = (
                    f"{json.loads(piece.path)[0]}: shard {piece.file}, row " if format == "huggingface" else f"{path}:"
                )
                raise CorruptDataError(
                    f"{place}{before + document.line}: {document.text}, or set bad_documents: skip to pass over such "
                    "documents"
                )
            yield document
    except ARCHIVE_ERRORS as error:
        raise CorruptDataError(f"{path}: damaged or truncated archive ({error}); fetch it again") from None


def format_of(path: Path) -> str:
    """Return what a file's name says of its format."""
    return next((name for name, suffixes in SUFFIXES.items() if path.name.endswith(suffixes)), "text")


def _read_json_lines(path: Path, piece: Piece, reading: Reading) -> Iterator[Document]:
    with open_lines(path) as lines:
        if piece.start:  # a line belongs to the piece that holds its first byte
            lines.seek(piece.start - 1)
            _skip_line(lines)
        yield from _parse_lines(lines, piece, reading)


def _parse_lines(lines: BinaryIO, piece: Piece, reading: Reading) -> Iterator[Document]:
    limit = min(_JSON_GROWTH * reading.max_bytes + BLOCK_BYTES, 1 << 62)
    number = 0
    while piece.end is None or lines.tell() < piece.end:
        line = lines.readline(limit)
        if not line:
            return
        number += 1
        if len(line) == limit and not line.endswith(b"\n"):
            _skip_line(lines)
            if reading.split_long:
                said = f"longer than {limit} bytes, too long to be split in memory; raise max_document_bytes"
                yield Document(said, line, piece.file, number, "line_too_long")
            else:
                yield Document("longer than max_document_bytes", line, piece.file, number, "too_long")
        elif line.strip():
            yield from _parse_line(line, piece.file, number, reading)


def count_lines(piece: Piece) -> int:
    """Return how many lines begin in a piece of a plain file."""
    assert piece.end is not None
    count, left = int(piece.start == 0), piece.end - max(piece.start, 1)
    with open(piece.path, "rb") as file:
        file.seek(max(piece.start - 1, 0))
        while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _skip_line(lines: BinaryIO) -> None:
    while (block := lines.readline(BLOCK_BYTES)) and not block.endswith(b"\n"):
        pass


def _parse_line(line: bytes, file: int, number: int, reading: Reading) -> Iterator[Document]:
    def fault(reason: str, said: str) -> Iterator[Document]:
        yield Document(said, line, file, number, reason)

    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes it would guess the encoding
    except UnicodeDecodeError as error:
        return fault("not_utf8", f"not UTF-8 ({error}); convert it first")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError of its own
        return fault("not_json", f"not valid JSON ({getattr(error, 'msg', error)}); mend or remove the line")
    if reading.format == "amber":
        return _parse_sequence(row, line, file, number, reading)
    text = row.get(reading.text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return fault("no_text", f"no text under '{reading.text_field}'; set the source's text_field")
    return _within_limit(text, file, number, reading)


def _within_limit(text: str, file: int, number: int, reading: Reading) -> Iterator[Document]:
    """Yield a text as one document, as several where it is longer than allowed and may be split, or as a fault."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        said = "half a surrogate pair in the text; mend or remove the line"
        yield Document(said, text.encode("utf-8", "surrogatepass"), file, number, "not_utf8")
        return
    if len(raw) <= reading.max_bytes:
        yield Document(text, raw, file, number)
    elif not reading.split_long:
        yield Document("longer than max_document_bytes", raw, file, number, "too_long")
    else:
        yield from _split(io.BytesIO(raw), file, number, reading.max_bytes)


def _split(text: BinaryIO, file: int, number: int, max_bytes: int) -> Iterator[Document]:
    """Yield documents of at most ``max_bytes``, cut after white space where there is some, never within a character."""
    rest = b""
    while block := rest + text.read(max_bytes - len(rest)):
        cut = len(block)
        if cut == max_bytes:
            cut = max(block.rfind(b"\n"), block.rfind(b" ")) + 1 or _character_border(block)
        rest = block[cut:]
        try:
            yield Document(block[:cut].decode("utf-8"), block[:cut], file, number)
        except UnicodeDecodeError as error:
            yield Document(f"not UTF-8 ({error}); convert it first", block[:cut], file, number, "not_utf8")


def _character_border(block: bytes) -> int:
    """Return where the last character of a block begins, or the block's end if that character is one byte."""
    border = len(block) - 1
    while border > len(block) - 4 and block[border] & 0xC0 == 0x80:
        border -= 1
    return border if block[border] >= 0xC0 else len(block)


def _parse_sequence(row: Any, line: bytes, file: int, number: int, reading: Reading) -> Iterator[Document]:
    ids = row.get("token_ids") if isinstance(row, dict) else None
    source: Any = row.get("source") if isinstance(row, dict) else None
    said = ""
    if not isinstance(ids, list) or not isinstance(source, str) or not all(type(i) is int for i in ids):
        said = "no sequence ('token_ids' with integers and 'source' with a label); mend or remove the line"
    elif len(ids) != reading.sequence_length:
        said = f"a sequence of {len(ids)} ids where sequence_length is {reading.sequence_length}; set it to {len(ids)}"
    elif not 0 <= min(ids) <= max(ids) < reading.vocab_size:
        said = f"ids outside the tokenizer's {reading.vocab_size}; name the tokenizer that made them"
    if said:
        yield Document(said, line, file, number, "no_sequence")
    elif not reading.label or source == reading.label:
        yield Document("", line, file, number, ids=ids, label=source)


def _read_text(path: Path, piece: Piece, reading: Reading) -> Iterator[Document]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size > reading.max_bytes:
            if reading.split_long:
                yield from _split(file, piece.file, 1, reading.max_bytes)
            else:
                head = file.read(BLOCK_BYTES)
                yield Document("longer than max_document_bytes", head, piece.file, 1, "too_long")
            return
        raw = file.read()
    try:
        yield Document(raw.decode("utf-8"), raw, piece.file, 1)
    except UnicodeDecodeError as error:
        yield Document(f"not UTF-8 ({error}); convert it first", raw, piece.file, 1, "not_utf8")


def _read_parquet(path: Path, piece: Piece, reading: Reading) -> Iterator[Document]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            if reading.text_field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UsageError(f"{path}: no column '{reading.text_field}' among {names}; set the source's text_field")
            number = 0
            for batch in file.iter_batches(64, columns=[reading.text_field]):
                for value in batch.column(0):
                    number += 1
                    yield from _cell(value.as_py(), piece.file, number, reading)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"{path}: damaged Parquet file ({error}); fetch it again") from None


def _cell(text: Any, file: int, number: int, reading: Reading) -> Iterator[Document]:
    if isinstance(text, str):
        return _within_limit(text, file, number, reading)
    said = f"no text under '{reading.text_field}'; set the source's text_field"
    return iter([Document(said, b"", file, number, "no_text")])


def hub_address(source: SourceConfig, shards: int) -> str:
    """Return the path of a piece of a hub's data set: what opens it, and in how many shards it must come."""
    return json.dumps([source.path, source.subset, source.split, source.revision, shards])


def hub_commit(source: SourceConfig) -> str:
    """Return the commit that a hub source's revision stands for now; a local directory's revision is its own.

    Raises:
        UsageError: the data set or revision cannot be found or reached.
    """
    from huggingface_hub import HfApi

    if Path(source.path).exists() or re.fullmatch("[0-9a-f]{40}", source.revision):
        return source.revision
    try:
        return str(HfApi().dataset_info(source.path, revision=source.revision or None).sha)
    except Exception as error:  # the hub's own errors and the network's
        raise UsageError(f"{source.path}: its commit cannot be found ({' '.join(str(error).split())})") from None


def hub_dataset(source: SourceConfig) -> Any:
    """Return the streaming data set of a source with ``format: huggingface``.

    Raises:
        UsageError: it cannot be found or reached.
    """
    from datasets import load_dataset

    options = {"split": source.split, "revision": source.revision or None, "streaming": True}
    try:
        return load_dataset(source.path, source.subset or None, **options)
    except Exception as error:  # the library raises its own errors, the hub's and the network's
        raise UsageError(f"{source.path}: cannot be opened as a data set ({' '.join(str(error).split())})") from None


def _read_hub(path: Path, piece: Piece, reading: Reading) -> Iterator[Document]:
    name, subset, split, revision, shards = json.loads(piece.path)
    rows = hub_dataset(SourceConfig(name, "huggingface", subset=subset, split=split, revision=revision))
    if rows.num_shards != shards:  # then shard n is made of other rows
        raise CorruptDataError(
            f"{name}: has {rows.num_shards} shards where there were {shards}; bring it back as it was"
        )
    number = 0
    try:
        for number, row in enumerate(rows.shard(num_shards=rows.num_shards, index=piece.file), 1):
            yield from _cell(row.get(reading.text_field), piece.file, number, reading)
    except Exception as error:  # the library raises its own errors, those of every file format and the network's
        said = f"cannot be read after row {number} of shard {piece.file} ({' '.join(str(error).split())})"
        raise CorruptDataError(f"{name}: {said}; fetch it again") from None
