"""What a person sees in the terminal: progress bars with an ETA, notes, tables. The only module that draws with rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

console = Console(stderr=True, highlight=False)
_PLAIN_SECONDS = 10.0


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=9)),
        BarColumn(bar_width=12, table_column=Column(no_wrap=True, min_width=4)),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}", table_column=Column(no_wrap=True, min_width=11)),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("ETA", table_column=Column(no_wrap=True, min_width=3)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),  # gives way in a narrow terminal
        console=console,
    )


class _PlainLines:
    """Progress for logs: a line when a stage starts or ends, and one every ten seconds between."""

    def __init__(self) -> None:
        self._last = -_PLAIN_SECONDS
        self._stage = ""

    def show(self, stage: str, done: float, total: float, facts: str = "") -> None:
        now = time.monotonic()
        if stage.split(":")[0] == self._stage and done < total and now - self._last < _PLAIN_SECONDS:
            return
        self._last, self._stage = now, stage.split(":")[0]
        console.print(f"{stage} {done:,.0f}/{total:,.0f} {facts}".rstrip(), soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """Yield ``show(stage, done, total, facts="")``, which moves the bar of a stage; a new stage gets a new bar.

    What stands behind a colon in ``stage`` is a detail that logs show and bars leave out.
    """
    if not console.is_terminal:
        yield _PlainLines().show
        return
    tasks: dict[str, Any] = {}
    with _bar() as bar:

        def show(stage: str, done: float, total: float, facts: str = "") -> None:
            key = stage.split(":")[0]
            if key not in tasks:
                tasks[key] = bar.add_task(key, total=total, facts=facts)
            bar.update(tasks[key], description=key, completed=done, total=total, facts=facts)

        yield show


class TrainingView:
    """Shows a training run: a bar with loss, rate and ETA, and a line at each validation.

    Args:
        show: moves the bars.
        verb: what the run's bar is called.
    """

    def __init__(self, show: Callable[..., None], verb: str) -> None:
        self._show, self._verb = show, verb
        self._steps = 0
        self._speed = 0.0

    def on_start(self, first_step: int, steps: int) -> None:
        """Draw the bar."""
        self._steps = steps
        self._show(self._verb, first_step, steps)

    def on_record(self, record: dict[str, Any]) -> None:
        """Move the bar, or print a validation."""
        if record["kind"] == "validation":
            parts = " · ".join(f"{name} {value:.3f}" for name, value in record["bits_per_byte_by_source"].items())
            held_out = f"loss {record['loss']:.4f}, {record['bits_per_byte']:.4f} bits per byte"
            note(f"step {record['step']:,}: held out {held_out} ({parts})")
            return
        if record["kind"] != "step" or record.get("loss") is None:
            return  # a note says what happened
        speed = record["tokens_per_second"]
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        facts = f"loss {record['loss']:.3f} · lr {record['learning_rate']:.1e} · {self._speed:,.0f} tokens/s"
        self._show(self._verb, record["step"], self._steps, facts)

    def on_note(self, text: str) -> None:
        """Print a note."""
        note(text)


def note(text: str) -> None:
    """Print a line for people (to standard error; standard output is for results)."""
    console.print(text, soft_wrap=True, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output; all columns but the first are numbers.

    In a terminal too narrow for it, it is printed in parts that repeat the first column.
    """
    drawn = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    output = Console(file=sys.stdout, highlight=False, width=160)
    if sys.stdout.isatty() and len(columns) > 2 and output.measure(drawn).maximum > Console(file=sys.stdout).width:
        half = 1 + len(columns) // 2
        table(title, columns[:half], [row[:half] for row in rows])
        table("", [columns[0], *columns[half:]], [[row[0], *row[half:]] for row in rows])
        return
    # At its natural width: what a terminal wraps is better than numbers cut short.
    output.print(drawn)
