"""One writer a directory: an advisory lock that the kernel frees however the process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobillama.errors import LockedError

_FILE = ".lock"
_LOOK_SECONDS = 0.1  # longer than :func:`is_locked` holds a lock to find out


@contextmanager
def locked(directory: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold ``directory/.lock`` while the block runs.

    Args:
        directory: what this process alone is to write into.
        what: the activity, as the other process's error names it.
        wait: until the other process is done, instead of an error.

    Raises:
        LockedError: another process holds the lock; the message carries its process id.
    """
    descriptor = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _take(descriptor, wait)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            raise LockedError(
                f"{directory}: {what} already runs here (process {holder}); stop it or use another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Tell whether a process holds the lock of a directory."""
    try:
        descriptor = os.open(directory / _FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, wait: bool) -> None:
    if wait:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_LOOK_SECONDS)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
