"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ECHO = (
    0.2  # seconds in which a signal counts as the same one again: timeout(1) sends it to the process and to its group
)


@dataclass
class StopFlag:
    """Whether this process was asked to stop."""

    requested: bool = False


@contextmanager
def stop_flag(on_note: Callable[[str], None]) -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a request; a second one ends the process at once, but under torchrun."""
    flag = StopFlag()
    # torchrun passes on what a terminal or Slurm has sent to its processes already, and ends those that take too long.
    later = signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL

    def request(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        time.sleep(_ECHO)
        for each in previous:
            signal.signal(each, later)
        on_note("stopping after this step and saving; once more stops at once, without saving")

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
