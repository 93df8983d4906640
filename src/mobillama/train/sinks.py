"""Copies of a run's metrics for TensorBoard, trackio and Weights & Biases; metrics.jsonl stays the truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mobillama.errors import UsageError


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
        run: the run directory; its name is the run's name.
        settings: the recipe, shown beside the curves.

    Raises:
        UsageError: the sink's package is not installed.
    """
    if name == "none":
        return None
    try:
        return _TensorBoard(run) if name == "tensorboard" else _Tracker(name, run, settings)
    except ModuleNotFoundError as error:
        raise UsageError(f"train.sink: needs {error.name}; pip install {name}, or set train.sink to none") from None


class _TensorBoard:
    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """trackio, or wandb, whose interface trackio has; both go on with a run of the same name."""

    def __init__(self, package: str, run: Path, settings: dict[str, Any]) -> None:
        import importlib

        self._tracker: Any = importlib.import_module(package)
        extra = {"id": run.name} if package == "wandb" else {}
        self._tracker.init(project="mobillama", name=run.name, config=settings, resume="allow", **extra)

    def add(self, record: dict[str, Any]) -> None:
        self._tracker.log(dict(_scalars(record)), step=record["step"])

    def close(self) -> None:
        self._tracker.finish()


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
