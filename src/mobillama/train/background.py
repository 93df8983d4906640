"""Work beside training, in threads that a process need not wait for when it ends."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Background(Thread, Generic[Value]):
    """Does ``work`` in a thread of its own, from now on: one that hangs stands in nobody's way."""

    def __init__(self, work: Callable[[], Value]) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        """What the work has raised."""
        self._work = work
        self.start()

    def run(self) -> None:
        """Do the work, as the thread."""
        try:
            self._value = self._work()
        except BaseException as error:
            self.error = error
        finally:
            del self._work  # and what it holds, a checkpoint's tensors say

    def ended(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for the thread's end, not the work's alone: an interpreter that ends before crashes."""
        self.join(seconds)
        return not self.is_alive()

    def result(self) -> Value:
        """Wait for the end, and return what the work returned or raise what it raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._value
