"""Work beside training, in threads that a process need not wait for when it ends."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Value = TypeVar("Value")


def in_background(work: Callable[[], Value]) -> Future[Value]:
    """Begin ``work`` in a thread of its own: one that hangs stands in nobody's way. Return its result to come."""
    future: Future[Value] = Future()

    def fulfil() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=fulfil, daemon=True).start()
    return future
