"""What a run directory holds, in a form that the page draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MOST_POINTS = 600


def run_summary(run: Path) -> dict[str, Any]:
    """Return a run's curves, evaluations and recipe; what is not there, or half-written, is left out."""
    steps, validations = [], []
    for line in _lines(run / "metrics.jsonl"):
        if line.get("kind") == "step" and "fault" not in line:
            steps.append(line)
        elif line.get("kind") == "validation":
            validations.append(line)
    recipe = run / "recipe.yaml"
    return {
        "name": run.resolve().name,
        "has_report": (run / "report.html").is_file(),
        "steps": len(steps) and steps[-1].get("step"),
        "tokens": len(steps) and steps[-1].get("tokens"),
        "curves": {
            "training loss (nats per token)": _curve(steps, "loss"),
            "held-out bits per byte": _curve(validations, "bits_per_byte"),
            "tokens per second": _curve(steps, "tokens_per_second"),
            "gradient norm": _curve(steps, "gradient_norm"),
        },
        "evaluations": [_evaluation(file) for file in sorted((run / "evals").glob("*/*/result.json"))[:200]],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("step-*")),
        "recipe": recipe.read_text(encoding="utf-8", errors="replace")[:65536] if recipe.is_file() else "",
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a run that is being written
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _curve(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, mean over neighbours), at most ``_MOST_POINTS`` of them."""
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    width = -(-len(points) // _MOST_POINTS) or 1
    parts = (points[start : start + width] for start in range(0, len(points), width))
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _evaluation(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        result = {}
    scores = result.get("scores", {}) if isinstance(result, dict) else {}
    return {"suite": file.parents[1].name, "model": file.parent.name, "scores": scores}
