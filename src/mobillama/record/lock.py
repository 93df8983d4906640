"""One writer a directory: an advisory lock that the kernel frees however the process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobillama.errors import UsageError


@contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Hold ``directory/.lock`` while the block runs; ``what`` names the activity in the other process's error.

    Raises:
        UsageError: another process holds the lock; the message carries its process id.
    """
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"{directory}: {what} already runs here (process {holder}); stop it or use another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
