"""Scores of evaluated models as a table: one model as a column with its standard errors, several as rows."""

from __future__ import annotations

import json
from typing import Any

from mobillama.console import note, table
from mobillama.errors import MobiLlamaError


def measures(result: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the named scores of a result, each with its standard error where it has one."""
    found: dict[str, tuple[float, float | None]] = {}
    if "holdout" in result:
        found["hold-out"] = result["holdout"]["bits_per_byte"], None
        found |= {f"  {name}": (bits, None) for name, bits in result["holdout"]["bits_per_byte_by_source"].items()}
    found |= {name: (facts["score"], facts["stderr"]) for name, facts in result.get("benchmarks", {}).items()}
    if result.get("average") is not None:
        found["average"] = result["average"], None
    return found


def show_results(suite: str, results: list[dict[str, Any]], floor: dict[str, float], as_json: bool) -> None:
    """Print results, and what must not go unsaid of them.

    Args:
        suite: its name.
        results: of :mod:`mobillama.evaluate.run`, in one suite.
        floor: what compressors and n-gram models reach on the hold-out.
        as_json: as JSON instead of a table.

    Raises:
        MobiLlamaError: some failed; the exit code is the greatest of theirs.
    """
    if as_json:
        print(json.dumps({"results": results, "baselines": floor}, indent=2))
    else:
        done = [result for result in results if result["status"] == "done"]
        if done:
            _table(suite, done, floor)
        said: dict[str, list[str]] = {}
        for result in done:
            for remark in _remarks(result):
                said.setdefault(remark, []).append(_label(result))
        for remark, names in said.items():
            note(f"{names[0] if len(names) == 1 else f'{len(names)} models'}: {remark}")
    failed = [result for result in results if result["status"] == "failed"]
    if failed:
        if len(results) > 1:
            for result in failed:
                note(f"{_label(result)}: failed: {result['error']}")
        error = MobiLlamaError(failed[0]["error"] if len(results) == 1 else f"{len(failed)} of {len(results)} failed")
        error.exit_code = max(result["exit_code"] for result in failed)
        raise error


def _table(suite: str, done: list[dict[str, Any]], floor: dict[str, float]) -> None:
    """Print one model as a column with its standard errors, several as rows."""
    digits = 4 if suite == "perplexity" else 2
    columns, benchmarks, limit = measures(done[0]), done[0].get("benchmarks", {}), done[0]["key"]["limit"]
    title = f"{suite}, only --limit {limit}" if limit else suite
    unit = "bits per byte (LAMBADA: percent)" if suite == "perplexity" else "percent"
    if len(done) == 1:
        rows = []
        for column, measure in columns.items():
            facts = benchmarks.get(column)
            about = (facts["metric"], f"{facts['questions']:,}") if facts else ("", "")
            rows.append((column, _cell(measure, digits), *about))
        rows += [(name, f"{value:.{digits}f}", "", "") for name, value in floor.items()]
        table(f"{title}: {_label(done[0])}", ["", unit, "metric", "questions"], rows)
        return
    names = [f"{name} ({benchmarks[name]['questions']:,})" if name in benchmarks else name for name in columns]
    rows_of_models = [
        (_label(result), *(f"{measures(result)[column][0]:.{digits}f}" for column in columns)) for result in done
    ]
    table(f"{title}, {unit} (questions in brackets); standard errors are in the records", ["", *names], rows_of_models)
    if floor:
        note("hold-out, bits per byte: " + " · ".join(f"{name} {value:.{digits}f}" for name, value in floor.items()))


def _label(result: dict[str, Any]) -> str:
    model = result["model"]
    return f"step {model['step']:,}" if "step" in model else str(model["name"])


def _cell(measure: tuple[float, float | None], digits: int) -> str:
    value, error = measure
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _remarks(result: dict[str, Any]) -> list[str]:
    """Return what must not go unsaid of a result that is done."""
    remarks, lost = [], result.get("truncated", {})
    if lost.get("contexts"):
        length = f"{result['context_length']:,} tokens"
        remarks.append(f"{lost['contexts']:,} contexts longer than the model's {length} lost their beginning")
    if lost.get("continuations"):
        remarks.append(
            f"{lost['continuations']:,} answers longer than the context were scored in part; do not compare them"
        )
    if ties := sum(facts["ties"] for facts in result.get("benchmarks", {}).values()):
        remarks.append(f"{ties:,} questions have no single likeliest choice; the first of the equal ones counts")
    if result.get("memory_ran_out"):
        remarks.append(f"memory ran out, so {result['batch_tokens']:,} tokens went through the model at once, not more")
    if result.get("packed") is False:
        remarks.append("takes no masks of ours, so choices were read one by one")
    return remarks
