"""Files that are either whole or absent, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError, UsageError

_BLOCK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits, reading it in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(content: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the one JSON encoding of ``value`` that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """Return the sha256 of :func:`canonical_json` as hexadecimal digits."""
    return sha256_bytes(canonical_json(value))


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory durable: a rename survives a power cut only after this."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush every file and directory below ``directory``, then ``directory`` itself, to the disk."""
    for root, _, names in os.walk(directory, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(root))


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes ``path`` at once and durably, on an error it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success it becomes ``path`` at once and durably, on an error it is removed.

    What a killed process left of an earlier attempt is removed first.

    Raises:
        UsageError: ``path`` exists, or cannot be made where it is to stand.
    """
    if path.exists():
        raise UsageError(f"{path}: exists already; choose another directory or remove it")
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if not _is_alive(leftover.name.split(".")[-2]):
            shutil.rmtree(leftover, ignore_errors=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; mend permissions or choose another place") from None
    try:
        yield work
        fsync_tree(work)
        os.rename(work, path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CorruptDataError: the file is missing, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptDataError(f"{path}: missing; restore it from a copy") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDataError(f"{path}: not valid JSON ({error}); restore it from a copy") from None
    if not isinstance(value, dict):
        raise CorruptDataError(f"{path}: holds no JSON object; restore it from a copy")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably (UTF-8)."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """Return a value as a JSON file for people and programs: indented."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs (indented, UTF-8), atomically and durably."""
    write_text(path, json_text(value))
