"""How long work tells what it has done: a function of the stage, what is done of it, and the whole."""

from __future__ import annotations

from collections.abc import Callable

Show = Callable[[str, float, float], None]


def quiet(stage: str, done: float, total: float) -> None:
    """Show no progress."""
