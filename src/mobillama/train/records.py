"""What a run writes down: metrics.jsonl for people and pictures, ledger.jsonl for proof."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobillama.errors import CorruptDataError
from mobillama.record.chain import START as CHAIN_START
from mobillama.record.chain import Chain
from mobillama.train.sinks import Sink

METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.jsonl"


class Records:
    """The two files of a run, in the process that writes them; in the others all methods do nothing.

    Args:
        run: the run directory.
        writes: whether this process writes.
        sink: what else is told of each metric, as long as it takes them.
        on_note: told when it does not.
    """

    def __init__(
        self, run: Path, writes: bool, sink: Sink | None, on_note: Callable[[str], None] = lambda text: None
    ) -> None:
        self.run, self.writes, self.sink, self.on_note = run, writes, sink, on_note

    def truncate(self, lengths: dict[str, int] | None) -> None:
        """Cut the files back to what a checkpoint's state says of them; None: to nothing.

        Raises:
            CorruptDataError: one is shorter than it was.
        """
        for name in (METRICS_FILE, LEDGER_FILE):
            file = self.run / name
            if lengths is None:
                file.unlink(missing_ok=True)
            elif not file.is_file() or file.stat().st_size < lengths[name]:
                raise CorruptDataError(f"{file}: shorter than when the checkpoint was saved; restore it from a copy")
            else:
                os.truncate(file, lengths[name])

    @contextmanager
    def open(self, first: dict[str, Any]) -> Iterator[None]:
        """Keep the files open for appending; ``first`` is the first line of a new ledger."""
        if not self.writes:
            yield
            return
        self._ledger = Chain(self.run / LEDGER_FILE)
        try:
            if self._ledger.head == CHAIN_START:
                self._ledger.append(first)
            with open(self.run / METRICS_FILE, "a", encoding="utf-8") as self._metrics:
                yield
        finally:
            self._ledger.close()
            self._tell(lambda sink: sink.close())

    def chain(self, entry: dict[str, Any]) -> None:
        """Add a line to the ledger."""
        if self.writes:
            self._ledger.append(entry)

    def add(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics, and tell the sink."""
        if not self.writes:
            return
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._tell(lambda sink: sink.add(record))

    def state(self) -> dict[str, Any]:
        """Make both files durable, and return what a checkpoint keeps of them."""
        if not self.writes:
            return {}
        os.fsync(self._metrics.fileno())
        lengths = {METRICS_FILE: os.fstat(self._metrics.fileno()).st_size, LEDGER_FILE: self._ledger.sync()}
        return {"bytes": lengths, "ledger": self._ledger.head}

    def _tell(self, what: Callable[[Sink], None]) -> None:
        """Tell the sink; one that fails is told no more, and the run goes on without it."""
        if self.sink is None:
            return
        try:
            what(self.sink)
        except Exception as error:
            self.sink = None
            self.on_note(f"train.sink: failed ({error}) and is told no more; {self.run / METRICS_FILE} holds all of it")


def recorded_steps(run: Path) -> int:
    """Return the last step that metrics.jsonl records; a line cut short by a kill does not count.

    Raises:
        CorruptDataError: its last line is no record.
    """
    metrics = run / METRICS_FILE
    if not metrics.is_file():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    try:
        return max((int(json.loads(line)["step"]) for line in lines[-2:]), default=0)
    except (ValueError, KeyError, TypeError):
        raise CorruptDataError(f"{metrics}: its last line is no record of a step; restore it from a copy") from None
