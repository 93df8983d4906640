"""What a model said to each question: the per-sample record of an evaluation, and where a killed one goes on.

``samples.jsonl`` begins with a line that names model, questions and precision. Then comes a line for each question as soon as
all its choices are scored: ``{"task", "document", "logprobs", "greedy"}``, log-probabilities in nats in the order of the
choices. All scores are computed from this file alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAMPLES_FILE = "samples.jsonl"
Answer = tuple[list[float], list[bool]]


class Samples:
    """The file of one evaluation, open for appending.

    Attributes:
        answers: log-probabilities and greediness by (task, document), those of an earlier, killed attempt included.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.answers: dict[tuple[str, int], Answer] = {}
        self._file = open(path, "a+b")  # noqa: SIM115 closed by :func:`open_samples`
        first = json.dumps(key, sort_keys=True).encode() + b"\n"
        whole = self._read(first)
        self._file.truncate(whole)  # a line cut short by a kill or damaged goes, and what stands behind it
        if not whole:
            self._file.write(first)

    def _read(self, first: bytes) -> int:
        """Take in the good lines of an earlier attempt at the same; return where they end."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if (end == 0 and line != first) or not line.endswith(b"\n"):
                break
            if end:
                try:
                    found = json.loads(line)
                    self.answers[found["task"], found["document"]] = found["logprobs"], found["greedy"]
                except (ValueError, KeyError, TypeError):
                    break
            end += len(line)
        return end

    def add(self, task: str, document: int, logprobs: list[float], greedy: list[bool]) -> None:
        """Record a question's answer."""
        logprobs = [float(f"{logprob:.8g}") for logprob in logprobs]
        self.answers[task, document] = logprobs, greedy
        line = {"task": task, "document": document, "logprobs": logprobs, "greedy": greedy}
        self._file.write(json.dumps(line).encode() + b"\n")

    def flush(self) -> None:
        """Hand what was added to the system, so that it outlives this process."""
        self._file.flush()

    def close(self) -> None:
        """Make the file durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def open_samples(directory: Path, key: dict[str, Any]) -> Iterator[Samples]:
    """Open the samples of an evaluation; those of an evaluation with another ``key`` are thrown away."""
    samples = Samples(directory / SAMPLES_FILE, key)
    try:
        yield samples
    finally:
        samples.close()
