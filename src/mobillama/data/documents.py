"""Raw documents: read one by one from JSON lines, text files or directories of them, each with its place of origin."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mobillama.errors import CorruptDataError, UsageError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".txt")


@dataclass(frozen=True)
class Document:
    """One document, its UTF-8 bytes, and where it stands: index of the file, line from 1 (a text file has one)."""

    text: str
    raw: bytes
    file: int
    line: int


def source_files(path: Path, source: str) -> list[Path]:
    """Return the files of a source in the order they are read: ``path`` itself, or the directory's files by name.

    Raises:
        UsageError: there is nothing to read; the message names the source.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UsageError(f"sources.{source}.path: {path} is none of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UsageError(f"sources.{source}.path: {path} does not exist")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise UsageError(f"sources.{source}.path: {path} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(files: list[Path], text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of ``files`` in order; documents without text are passed over.

    Raises:
        CorruptDataError: a file is truncated, not UTF-8, or a line is not a JSON object with a text; file and line named.
    """
    for number, path in enumerate(files):
        try:
            if path.name.endswith(".txt"):
                raw = path.read_bytes()
                if raw:
                    yield Document(raw.decode("utf-8"), raw, number, 1)
                continue
            with _open_lines(path) as lines:
                yield from _read_lines(lines, path, number, text_field)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise CorruptDataError(f"{path}: damaged or truncated archive ({error}); fetch it again") from None
        except UnicodeDecodeError as error:
            raise CorruptDataError(f"{path}: not UTF-8 ({error}); convert it first") from None


def _open_lines(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return open(path, "rb")


def _read_lines(lines: Iterable[bytes], path: Path, number: int, text_field: str) -> Iterator[Document]:
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorruptDataError(
                f"{path}:{line_number}: not valid JSON ({error.msg}); mend or remove the line"
            ) from None
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise CorruptDataError(f"{path}:{line_number}: no text under '{text_field}'; set the source's text_field")
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            raise CorruptDataError(
                f"{path}:{line_number}: half a surrogate pair in the text; mend or remove the line"
            ) from None
        if text:
            yield Document(text, raw, number, line_number)
