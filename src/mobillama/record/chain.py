"""Files of JSON lines that are chained by their hashes: no line can be changed, removed or put in without it showing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError
from mobillama.record.files import canonical_json, sha256_bytes

START = "0" * 64


class Chain:
    """A chained file that is open for appending. Each line's ``previous`` is the sha256 of the line before.

    Args:
        path: the file; it is made where it is missing.

    Raises:
        CorruptDataError: its last line is no line of a chain.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115 closed in close()
        self.head = _digest_of_last_line(path)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, whose values are JSON's and finite, as a line."""
        line = canonical_json({**record, "previous": self.head})
        self._file.write(line + b"\n")
        self._file.flush()
        self.head = sha256_bytes(line)

    def sync(self) -> int:
        """Make all lines durable and return the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_chain(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a chained file, each after checking that it follows from the one before.

    Raises:
        CorruptDataError: a line was changed, removed or put in, or the last one is cut short; the message names it.
    """
    head = START
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                whole = line == canonical_json(record) + b"\n" and record["previous"] == head
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                said = f"{path}:{number}: does not follow from the line before: it was changed, or others are missing"
                raise CorruptDataError(f"{said}; restore the file from a copy")
            head = sha256_bytes(line[:-1])
            yield record


def _digest_of_last_line(path: Path) -> str:
    size = path.stat().st_size
    if not size:
        return START
    with open(path, "rb") as file:
        file.seek(max(0, size - (1 << 20)))
        *_, last, rest = b"\n".join([b"", file.read()]).split(b"\n")
    if rest or not last.startswith(b"{"):
        raise CorruptDataError(f"{path}: its last line is cut short; restore the file from a copy")
    return sha256_bytes(last)
