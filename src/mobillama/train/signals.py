"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopFlag:
    """Whether this process was asked to stop."""

    requested: bool = False


@contextmanager
def stop_flag(on_note: Callable[[str], None]) -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a request; a second one ends the process at once."""
    flag = StopFlag()

    def request(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        on_note("stopping after this step and saving; once more stops at once, without saving")

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
