"""The paper's tables with our rows in them, and marks on what cannot be right."""

from __future__ import annotations

from pathlib import Path

from mobillama.console import note, table
from mobillama.errors import UsageError
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
        values = zip(columns, [*row.scores, row.average], strict=True)
        rows.append((row.name, row.size, *(f"{v:.2f}" + (mark(found[c]) if c in found else "") for c, v in values)))
    for place in ours:
        directory = place.parent if place.name == RESULT_FILE else place
        result = read_result(directory)
        if result is None:
            raise UsageError(f"--ours: {directory}: holds no whole {RESULT_FILE}; name a directory below evals/")
        rows.append((f"ours: {result['model']['name']}", "", *(f"{value:.2f}" for value in our_row(paper, result))))
    table(paper.title, ["model", "size", *columns], rows)
    agreeing = sum("average" not in doubts(paper, row) for row in paper.rows)
    note(f"{agreeing} of {len(paper.rows)} averages are the mean of their row, cut to two decimals")
    for index, reason in enumerate(reasons, 1):
        note(f"[{index}] {reason}")
    for remark in paper.remarks:
        note(f"also: {remark}")
