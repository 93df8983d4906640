"""Copies of a run's metrics for TensorBoard, trackio and Weights & Biases; metrics.jsonl stays the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from mobillama.errors import UsageError
from mobillama.record.files import sha256_file


class Sink(Protocol):
    """Takes a run's metrics."""

    def add(self, record: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl."""

    def close(self) -> None:
        """Send what is still held."""


def open_sink(name: str, run: Path, settings: dict[str, Any]) -> Sink | None:
    """Return the sink that a recipe names.

    Args:
        name: ``none``, ``tensorboard``, ``trackio`` or ``wandb``.
        run: the run directory, with its environment.json; its name is the run's name.
        settings: the recipe, shown beside the curves.

    Raises:
        UsageError: the sink's package is not installed or does not start.
    """
    if name == "none":
        return None
    try:
        with redirect_stdout(sys.stderr):  # what they have to say is no result of ours
            return _SINKS[name](run, settings)
    except ModuleNotFoundError as error:
        raise UsageError(f"train.sink: needs {error.name}; pip install {name}, or set train.sink to none") from None
    except Exception as error:  # each has errors of its own: no account, no network, no space
        raise UsageError(f"train.sink: {name} does not start ({error}); mend that, or set it to none") from None


class _TensorBoard:
    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        name = f"{run.name}-{_identity(run)}"  # it goes on with a run of the same name
        trackio.init(project="mobillama", name=name, config=settings, resume="allow")

    def add(self, record: dict[str, Any]) -> None:
        self._trackio.log(dict(_scalars(record)), step=record["step"])

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


class _Wandb:
    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="mobillama", name=run.name, id=_identity(run), dir=str(run), config=settings, resume="allow"
        )
        # Its own count of steps must never go back, as ours does after a rollback, or when a checkpoint is done late.
        self._run.define_metric("*", step_metric="after_step")

    def add(self, record: dict[str, Any]) -> None:
        self._run.log({**dict(_scalars(record)), "after_step": record["step"]})

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def _identity(run: Path) -> str:
    """Return what tells a run from others of its name, and is the same whenever it goes on."""
    return sha256_file(run / "environment.json")[:8]


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names such as ``step/loss_by_source/c4`` with their numbers."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from walk(f"{name}/{key}", part)
        elif isinstance(value, int | float):
            yield name, value

    for key, value in record.items():
        if key not in ("kind", "step"):
            yield from walk(f"{record['kind']}/{key}", value)
