"""The paper's tables with our rows in them, and marks on what cannot be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobillama.console import note, table
from mobillama.errors import CorruptDataError, UsageError
from mobillama.evaluate.paper import doubts, find_table, our_row
from mobillama.evaluate.results import RESULT_FILE, read_result


def show_table(number: int, ours: list[Path]) -> None:
    """Print a table of the paper; suspicious cells carry a number, explained below.

    Args:
        number: 3, 5, 7 or 9.
        ours: directories of evaluations in suite ``paper`` (or their result.json), each to be a row.

    Raises:
        UsageError: there is no such table, or no such evaluation.
    """
    paper = find_table(number)
    reasons: list[str] = []

    def mark(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f" [{reasons.index(reason) + 1}]"

    columns = [*paper.columns, "average"]
    rows = []
    for row in paper.rows:
        found = doubts(paper, row)
        cells = zip(columns, row.printed, strict=True)
        rows.append((row.name, row.size, *(cell + (mark(found[c]) if c in found else "") for c, cell in cells)))
    directories = [place.parent if place.name == RESULT_FILE else place for place in ours]
    results = [_our_result(directory) for directory in directories]
    for directory, result in zip(directories, results, strict=True):
        try:
            rows.append((f"ours: {result['model']['name']}", "", *(f"{value:.2f}" for value in our_row(paper, result))))
        except (KeyError, TypeError, ValueError):
            raise _damaged(directory) from None
    table(paper.title, ["model", "size", *columns], rows)
    agreeing = sum("average" not in doubts(paper, row) for row in paper.rows)
    note(f"{agreeing} of {len(paper.rows)} averages are the mean of their row, cut to two decimals")
    for index, reason in enumerate(reasons, 1):
        note(f"[{index}] {reason}")
    for remark in paper.remarks:
        note(f"also: {remark}")
    for result in results:
        errors = " · ".join(f"{column} {result['benchmarks'][column]['stderr']:.2f}" for column in paper.columns)
        note(
            f"{result['model']['name']}: {result['precision']}, {result['truncated']['contexts']:,} contexts cut to "
            f"{result['context_length']:,} tokens; standard errors {errors}"
        )


def _damaged(directory: Path) -> CorruptDataError:
    return CorruptDataError(f"--ours: {directory}: its {RESULT_FILE} is damaged or cut short; evaluate again")


def _our_result(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise UsageError(f"--ours: {directory}: {what}; name a directory below evals/paper")
    if result := read_result(directory):
        return result
    if (directory / RESULT_FILE).is_file():
        raise _damaged(directory)
    if (directory / "config.json").is_file():
        raise UsageError(
            f"--ours: {directory}: is a model; evaluate it with --suite paper and name the directory of that"
        )
    inside = [str(path.parent.relative_to(directory)) for path in sorted(directory.rglob(RESULT_FILE))]
    if inside:
        raise UsageError(f"--ours: {directory}: holds evaluations, but is none itself; name them: {', '.join(inside)}")
    raise UsageError(f"--ours: {directory}: holds no {RESULT_FILE}; name a directory below evals/paper")
