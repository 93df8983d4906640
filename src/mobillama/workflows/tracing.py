"""From a text to the documents that hold it and the training steps that learn from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mobillama.console import note, progress
from mobillama.data.dataset import Dataset
from mobillama.data.trace import Hits, Occurrence, steps_of_rows, trace
from mobillama.data.trace_index import build_index
from mobillama.errors import UsageError
from mobillama.workflows.inspect import open_data

_LISTED = 8
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class _Order:
    """The order in which a model sees the rows; without a batch size, positions are told instead of steps."""

    seed: int
    batch_size: int | None
    steps: int

    def of(self, dataset: Dataset, rows: list[int]) -> dict[int, list[int]]:
        """Return the steps of each row (from 1), or its positions (from 0)."""
        steps = steps_of_rows(dataset, rows, self.seed, self.batch_size or 1, self.steps)
        return steps if self.batch_size else {row: [step - 1 for step in of_row] for row, of_row in steps.items()}


def show_trace(
    path: Path, text: str, limit: int, seed: int | None, batch_size: int | None, epochs: int, as_json: bool
) -> None:
    """Print where a text stands in the training data, and in which steps a model sees it; the first use builds an index.

    Args:
        path: a run directory, whose recipe tells batch size, seed and steps, or a data directory.
        text: what to look for, exactly.
        limit: places to show.
        seed: of the order; None: the run's, or the prepared one.
        batch_size: sequences in a step; None: the run's, or positions in the order are told instead of steps.
        epochs: passes over the data, where a data directory is given.
        as_json: print a JSON object a line.

    Raises:
        UsageError: an argument is out of range, or the run's data are no longer those it learned from.
        CorruptDataError: the data differ from what was prepared.
    """
    for name, value in (("--limit", limit), ("--epochs", epochs), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: {value} is not a positive number")
    dataset, order = _open(path, seed, batch_size, epochs)
    with progress() as show:
        build_index(dataset, show)
    hits = trace(dataset, text, limit)
    seen = order.of(dataset, [row for occurrence in hits.occurrences for row in occurrence.rows])
    for occurrence in hits.occurrences:
        if as_json:
            print(json.dumps(_as_object(occurrence, seen, order), ensure_ascii=False))
        else:
            print("\n".join(_lines(occurrence, seen, order)))
    note(_summary(path, text, hits))
    if hits.occurrences and not order.batch_size and not as_json:
        note("positions count the sequences of training from 0; --batch-size gives steps instead")


def _open(path: Path, seed: int | None, batch_size: int | None, epochs: int) -> tuple[Dataset, _Order]:
    dataset, recipe = open_data(path)
    if recipe is None:
        steps = -(-epochs * dataset.size // (batch_size or 1))
        return dataset, _Order(dataset.prepared_seed if seed is None else seed, batch_size, steps)
    seed = recipe.seed if seed is None else seed
    return dataset, _Order(seed, batch_size or recipe.train.batch_size, recipe.train.steps)


def _as_object(occurrence: Occurrence, seen: dict[int, list[int]], order: _Order) -> dict[str, object]:
    key = "steps" if order.batch_size else "positions"
    parts = [{**asdict(part), "rows": [{"row": row, key: seen[row]} for row in part.rows]} for part in occurrence.parts]
    return {**asdict(occurrence), "parts": parts}


def _lines(occurrence: Occurrence, seen: dict[int, list[int]], order: _Order) -> Iterator[str]:
    place = f"{occurrence.file}:{occurrence.line}"
    yield f"── {occurrence.source} · document {occurrence.document} · {place} · sha256 {occurrence.digest}…"
    token = occurrence.token
    for part in occurrence.parts:
        ids = f"   ids {token}…{token + part.end - part.start} of the document"
        token += part.end - part.start
        if part.held_out:
            yield f"{ids}: held out, in no step"
        for row in part.rows:
            yield f"{ids}: row {row}, {_listed(seen[row], order)}"
    text = occurrence.text
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS // 2]} … {text[-_SHOWN_CHARACTERS // 2 :]}"
    yield "   " + f"{occurrence.before}»{text}«{occurrence.after}".replace("\n", "\n   ")


def _listed(places: list[int], order: _Order) -> str:
    if not places:
        return f"in none of the {order.steps:,} steps"
    more = f" and {len(places) - _LISTED:,} more" if len(places) > _LISTED else ""
    noun = ("step" if order.batch_size else "position") + "s" * (len(places) > 1)
    return f"{noun} {', '.join(f'{place:,}' for place in places[:_LISTED])}{more}"


def _summary(path: Path, text: str, hits: Hits) -> str:
    if not hits.total:
        return f"{path}: no document that is stored holds {text!r} (case, spaces and line breaks count)"
    places = f"{'' if hits.exact else 'about '}{hits.total:,} place{'s' * (hits.total > 1)}"
    if len(hits.occurrences) < hits.total:
        return f"showing {len(hits.occurrences)} of {places}; --limit shows more"
    documents = len({(occurrence.source, occurrence.document) for occurrence in hits.occurrences})
    return f"{places} in {documents:,} document{'s' * (documents > 1)}"
