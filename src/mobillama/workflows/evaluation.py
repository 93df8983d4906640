"""Evaluating models, revisions and all checkpoints of a run; what comes out as a table, and as a picture against tokens."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobillama.config import read_mapping
from mobillama.console import note, progress, table
from mobillama.data.dataset import Dataset
from mobillama.directory import MODEL_TYPE
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError
from mobillama.evaluate.heldout import evaluate_baselines
from mobillama.evaluate.model import ModelFiles, find_model, list_revisions, number_of
from mobillama.evaluate.run import Evaluator, record_failure
from mobillama.evaluate.suites import find_suite
from mobillama.record.manifest import MANIFEST_NAME
from mobillama.train.checkpoint import list_checkpoints
from mobillama.train.records import METRICS_FILE

BENCHMARKS_VARIABLE = "MOBILLAMA_BENCHMARKS"
CACHE_VARIABLE = "MOBILLAMA_CACHE"
_POLL_SECONDS = 20.0


@dataclass(frozen=True)
class Settings:
    """What the command line says of an evaluation."""

    suite: str
    benchmarks: Path | None
    """Local copies of the benchmarks' data; None: MOBILLAMA_BENCHMARKS, else the hub."""
    data: Path | None
    """A prepared data set whose hold-out the suite perplexity reads."""
    limit: int
    device: str
    precision: str

    def named(self, name: str) -> str:
        """Return the name of a file or directory with what else than the default was asked for, as ``NAME-limit-2``."""
        limit = f"-limit-{self.limit}" if self.limit else ""
        precision = f"-{self.precision}" if self.precision != "auto" else ""
        return f"{name}{limit}{precision}"


def evaluate_models(
    names: list[str], revisions: list[str], settings: Settings, out: Path, baselines: bool, as_json: bool
) -> None:
    """Evaluate models, or revisions of one repository, and print their scores.

    Raises:
        UsageError: a model is not there, or is none; all such are named at once, and nothing is evaluated.
        MobiLlamaError: a model failed; the others are evaluated, and the record says why.
    """
    if revisions and len(names) != 1:
        raise UsageError("--revisions: belong to one repository; name one MODEL")
    if revisions and Path(names[0]).exists():
        raise UsageError(f"--revisions: belong to a repository of the hub, but {names[0]} is here; leave them out")
    if revisions == ["all"]:
        revisions = list_revisions(names[0])
    _check_out(out)
    wanted: list[tuple[str, str | None]] = [(name, None) for name in names]
    wanted = [(names[0], revision) for revision in revisions] or wanted
    found = _find_models(wanted)
    if settings.data is not None:
        _check_read_data([model for model in found if isinstance(model, ModelFiles)])
    with progress() as show:
        evaluator = _evaluator(settings, settings.data, show)
        results = []
        for (name, revision), model in zip(wanted, found, strict=True):
            facts = {"revision": revision, "number": number_of(revision)} if revision else {}
            if isinstance(model, ModelFiles):
                results.append(evaluator.evaluate(model, _directory(model, settings, out), facts))
            else:
                directory = out / settings.suite / settings.named(_file_name(name))
                results.append(record_failure(directory, name, facts, model))
        numbered = [r for r in results if r["status"] == "done" and r["model"].get("number") is not None]
        if len(numbered) > 1:
            _draw_revisions(numbered, out / settings.suite / f"{settings.named(_file_name(names[0]))}.png")
        floor = evaluate_baselines(evaluator.dataset, settings.limit) if baselines and evaluator.dataset else {}
    _show(settings.suite, results, floor, as_json)


def evaluate_run(run: Path, settings: Settings, follow: bool, as_json: bool) -> None:
    """Evaluate every checkpoint of a run into ``RUN/evals``, newest last, and draw the scores against tokens.

    Several processes may do so at once, each with a device of its own: what one works on, the others pass over.

    Args:
        run: the run directory.
        settings: of each evaluation; the hold-out is the run's.
        follow: go on until the last checkpoint of the run's recipe is evaluated.
        as_json: print JSON instead of a table.

    Raises:
        MobiLlamaError: a checkpoint failed; the others are evaluated.
    """
    from mobillama.report.picture import draw_evaluations

    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"{run}: no recipe.yaml there, so this is no run; --all-checkpoints takes a run directory")
    recipe = read_mapping(run / "recipe.yaml")
    data = settings.data or (Path(recipe["data"]) if "data" in recipe else None)  # a tuning run's hold-out is no text
    picture = run / "evals" / f"{settings.named(settings.suite)}.png"
    results: dict[int, dict[str, Any]] = {}
    with progress() as show:
        evaluator = _evaluator(settings, data, show)
        for step, path in _checkpoints(run, recipe["train"]["steps"], follow):
            directory = run / "evals" / settings.suite / settings.named(path.name)
            facts = {"step": step, "tokens": step * _tokens_per_step(run)}
            try:
                results[step] = _evaluate(evaluator, path / "model", directory, facts)
            except UsageError as error:
                note(f"passed over: {error}")
            done = [results[number] for number in sorted(results) if results[number]["status"] == "done"]
            if done:
                draw_evaluations(done, picture, run)
    if not results:
        raise UsageError(f"{run}: has no checkpoint yet; --follow waits for them")
    note(f"picture: {picture}")
    _show(settings.suite, [results[step] for step in sorted(results)], {}, as_json)


def _evaluate(evaluator: Evaluator, model: Path, directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    try:
        files = find_model(str(model), _cache())
    except MobiLlamaError as error:
        return record_failure(directory, str(model), facts, error)
    return evaluator.evaluate(files, directory, facts)


def _check_out(out: Path) -> None:
    """Find out before hours of work whether results can be written."""
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UsageError(f"--out: {nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--out: {nearest} is not writable; name another directory")


def _find_models(wanted: list[tuple[str, str | None]]) -> list[ModelFiles | CorruptDataError]:
    """Return models, or what is wrong with their files; what is no model at all is raised, all of it at once."""
    found: list[ModelFiles | CorruptDataError] = []
    wrong = []
    for name, revision in wanted:
        try:
            found.append(find_model(name, _cache(), revision))
        except CorruptDataError as error:
            found.append(error)
        except UsageError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        for each in wrong:
            note(str(each))
        raise UsageError(
            f"{len(wrong)} of {len(wanted)} are no models to evaluate, so nothing was; mend or leave them out"
        )
    return found


def _check_read_data(models: list[ModelFiles]) -> None:
    others = [model.name for model in models if model.type != MODEL_TYPE]
    if others:
        raise UsageError(f"--data: reads only {MODEL_TYPE} models; leave it out for {', '.join(others)}")


def _draw_revisions(results: list[dict[str, Any]], out: Path) -> None:
    from mobillama.report.picture import draw_evaluations

    draw_evaluations(sorted(results, key=lambda result: int(result["model"]["number"])), out)
    note(f"picture: {out}")


def _checkpoints(run: Path, last: int, follow: bool) -> Iterator[tuple[int, Path]]:
    """Yield the checkpoints of a run, and with ``follow`` those that come until its last step; name what is none."""
    seen: set[int] = set()
    while True:
        for step, path in list_checkpoints(run / "checkpoints"):
            if step not in seen:
                seen.add(step)
                yield step, path
        if not follow or last in seen:
            break
        time.sleep(_POLL_SECONDS)
    for path in sorted((run / "checkpoints").glob("step-*")):
        if re.fullmatch(r"step-\d+", path.name) and not (path / MANIFEST_NAME).is_file():
            note(f"step {int(path.name.removeprefix('step-')):,}: no {MANIFEST_NAME}, passed over")


def _cache() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "mobillama") / "evaluate"


def _evaluator(settings: Settings, data: Path | None, show: Any) -> Evaluator:
    suite = find_suite(settings.suite)
    named = settings.benchmarks or os.environ.get(BENCHMARKS_VARIABLE)
    folder = Path(named) if named else None
    if folder is not None and folder.is_file():
        raise UsageError(f"--benchmarks: {folder} is a file; name the directory of the local copies")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; name the local copies of the benchmarks with --benchmarks")
    dataset = Dataset(data) if data is not None and suite.name == "perplexity" else None
    if dataset is not None and folder is None:
        note("WikiText-2 and LAMBADA are left out: name their directory with --benchmarks")
        suite = replace(suite, benchmarks=())
    evaluator = Evaluator(suite, folder, _cache(), settings.limit, settings.device, settings.precision, dataset, show)
    _ = evaluator.tasks  # what is missing is said before any model is opened
    return evaluator


def _directory(files: ModelFiles, settings: Settings, out: Path) -> Path:
    """Return where a model's evaluation is kept: beside its run's checkpoints, else in ``out``."""
    checkpoint = files.directory.resolve().parent
    if re.fullmatch(r"step-\d+", checkpoint.name) and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "evals" / settings.suite / settings.named(checkpoint.name)
    return out / settings.suite / settings.named(f"{_file_name(files.name)}-{files.digest[:8]}")


def _file_name(model: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", model).strip("-.")


def _tokens_per_step(run: Path) -> int:
    """Return how many tokens a step of a run learns from; 0 if it recorded none."""
    try:
        with open(run / METRICS_FILE, encoding="utf-8") as file:
            first = next((record for line in file if (record := json.loads(line))["kind"] == "step"), None)
    except FileNotFoundError:
        return 0
    return first["tokens"] // first["step"] if first else 0


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


def _show(suite: str, results: list[dict[str, Any]], floor: dict[str, float], as_json: bool) -> None:
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
    if result.get("packed") is False:
        remarks.append("takes no masks of ours, so choices were read one by one")
    return remarks
