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
from mobillama.console import note, progress
from mobillama.data.dataset import Dataset
from mobillama.directory import MODEL_TYPE
from mobillama.errors import LockedError, MobiLlamaError, UsageError
from mobillama.evaluate.heldout import evaluate_baselines
from mobillama.evaluate.model import ModelFiles, find_model, list_revisions, number_of
from mobillama.evaluate.results import read_result
from mobillama.evaluate.run import Evaluator, record_failure
from mobillama.evaluate.suites import find_suite
from mobillama.record.lock import is_locked
from mobillama.record.manifest import MANIFEST_NAME
from mobillama.train.checkpoint import list_checkpoints
from mobillama.train.records import METRICS_FILE
from mobillama.workflows.scoretables import show_results

BENCHMARKS_VARIABLE = "MOBILLAMA_BENCHMARKS"
CACHE_VARIABLE = "MOBILLAMA_CACHE"
_OUT = Path("evals")
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
    names: list[str], revisions: list[str], settings: Settings, out: Path | None, baselines: bool, as_json: bool
) -> None:
    """Evaluate models, or revisions of one repository, and print their scores.

    Args:
        names: model directories, GGUF files or repositories of the hub.
        revisions: of the one repository.
        settings: of each evaluation.
        out: where results go; None: a checkpoint's into its run, others' into ``evals``.
        baselines: compute what compressors and n-gram models reach on the hold-out.
        as_json: print JSON instead of a table.

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
    _check_out(out or _OUT)
    wanted: list[tuple[str, str | None]] = [(name, None) for name in names]
    wanted = [(names[0], revision) for revision in revisions] or wanted
    found = _find_models(wanted)
    if settings.data is not None:
        _check_read_data([model for model in found if isinstance(model, ModelFiles)])
    elif settings.suite == "perplexity":
        note("no hold-out is read; --data names the prepared data that has one")
    with progress() as show:
        evaluator = _evaluator(settings, settings.data, show)
        results = []
        for (name, revision), model in zip(wanted, found, strict=True):
            facts = {"revision": revision, "number": number_of(revision)} if revision else {}
            results.append(_evaluate(evaluator, name, model, _directory(name, model, settings, out), facts))
        numbered = [r for r in results if r["model"].get("number") is not None]
        if len(numbered) > 1:
            numbered.sort(key=lambda result: int(result["model"]["number"]))
            _draw(numbered, (out or _OUT) / settings.suite / f"{settings.named(_file_name(names[0]))}.png")
        floor = _baselines(evaluator) if baselines else {}
    show_results(settings.suite, results, floor, as_json)


def evaluate_run(run: Path, settings: Settings, follow: bool, baselines: bool, as_json: bool) -> None:
    """Evaluate every checkpoint of a run into ``RUN/evals``, newest last, and draw the scores against tokens.

    Several processes may do so at once, each with a device of its own: what one works on, the others pass over. Each draws
    and prints what all of them have done.

    Args:
        run: the run directory.
        settings: of each evaluation; the hold-out is the run's.
        follow: go on until the last checkpoint of the run's recipe is evaluated, or its trainer is gone.
        baselines: compute what compressors and n-gram models reach on the hold-out.
        as_json: print JSON instead of a table.

    Raises:
        LockedError: other processes evaluate all checkpoints there are.
        MobiLlamaError: a checkpoint failed; the others are evaluated.
    """
    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"{run}: no recipe.yaml there, so this is no run; --all-checkpoints takes a run directory")
    recipe = read_mapping(run / "recipe.yaml")
    data = settings.data
    if data is None and "data" in recipe:  # a tuning run's hold-out is no text
        data = Path(recipe["data"])
        if settings.suite == "perplexity" and not data.is_dir():
            raise UsageError(f"{data}: no such directory, where {run} had its data; name them with --data")
    if baselines and data is None:
        raise UsageError(f"--baselines: {run} states no data; name the prepared data with --data")
    picture = run / "evals" / f"{settings.named(settings.suite)}.png"
    results: dict[int, dict[str, Any]] = {}
    keys: dict[int, dict[str, Any] | None] = {}
    with progress() as show:
        evaluator = _evaluator(settings, data, show)
        for step, path in _checkpoints(run, recipe["train"]["steps"], follow):
            name = str(path / "model")
            directory = run / "evals" / settings.suite / settings.named(path.name)
            model = _find(name)
            keys[step] = evaluator.key(model) if isinstance(model, ModelFiles) else None
            try:
                # One that is removed while it is read is not a failure of the model.
                result = None if _is_gone(path) else _evaluate(evaluator, name, model, directory, _facts(run, step))
                if result is None or (result["status"] == "failed" and _is_gone(path)):
                    note(f"step {step:,}: removed meanwhile, passed over")
                    del keys[step]
            except LockedError:
                note(f"step {step:,}: another process evaluates it, passed over")
            drawn = None
            while (results := _read_results(run, settings, evaluator, keys)) != drawn:  # others went on meanwhile
                drawn = results
                _draw(list(results.values()), picture, run)
        floor = _baselines(evaluator) if baselines else {}
    elsewhere = [step for step in keys if step not in results]
    if elsewhere and not results:
        raise LockedError(
            f"{run}: all {len(elsewhere)} are being evaluated elsewhere; run this again when that has ended"
        )
    if not results:
        raise UsageError(f"{run}: has no checkpoint yet; --follow waits for them while a trainer runs there")
    if elsewhere:
        note(f"{len(elsewhere)} of {len(keys)} are being evaluated elsewhere, and are missing here")
    if picture.is_file():
        note(f"picture: {picture}")
    show_results(settings.suite, list(results.values()), floor, as_json)


def _read_results(
    run: Path, settings: Settings, evaluator: Evaluator, keys: dict[int, dict[str, Any] | None]
) -> dict[int, dict[str, Any]]:
    """Return the results of a run's checkpoints by step, whichever process wrote them, and of those removed since.

    Args:
        keys: what the result of each checkpoint met depends on; None: its files are damaged.
    """
    found = {}
    for directory in (run / "evals" / settings.suite).glob("step-*"):
        named = re.fullmatch(rf"step-(\d+){re.escape(settings.named(''))}", directory.name)
        result = read_result(directory) if named else None
        if named is None or result is None:
            continue
        step, key = int(named[1]), result["key"]
        if step in keys:
            counts = key == keys[step]
        else:
            counts = result["status"] == "done" and key | {"model": ""} == evaluator.protocol | {"model": ""}
        if counts:
            found[step] = {**result, "model": result["model"] | _facts(run, step)}
    return dict(sorted(found.items()))


def _find(name: str, revision: str | None = None) -> ModelFiles | MobiLlamaError:
    try:
        return find_model(name, _cache(), revision)
    except MobiLlamaError as error:
        return error


def _evaluate(
    evaluator: Evaluator, name: str, model: ModelFiles | MobiLlamaError, directory: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    if isinstance(model, ModelFiles):
        return evaluator.evaluate(model, directory, facts)
    return record_failure(directory, name, facts, model)


def _baselines(evaluator: Evaluator) -> dict[str, float]:
    return evaluate_baselines(evaluator.dataset, evaluator.limit) if evaluator.dataset else {}


def _draw(results: list[dict[str, Any]], out: Path, run: Path | None = None) -> None:
    """Draw what is done of a run's checkpoints, or of revisions."""
    from mobillama.report.picture import draw_evaluations

    done = [result for result in results if result["status"] == "done"]
    if done:
        draw_evaluations(done, out, run)
        if run is None:
            note(f"picture: {out}")


def _check_out(out: Path) -> None:
    """Find out before hours of work whether results can be written."""
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UsageError(f"--out: {nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--out: {nearest} is not writable; name another directory")


def _find_models(wanted: list[tuple[str, str | None]]) -> list[ModelFiles | MobiLlamaError]:
    """Return models, or what is wrong with their files; what is no model at all is raised, all of it at once."""
    found = [_find(name, revision) for name, revision in wanted]
    wrong = [model for model in found if isinstance(model, UsageError)]
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


def _checkpoints(run: Path, last: int, follow: bool) -> Iterator[tuple[int, Path]]:
    """Yield the checkpoints of a run, and with ``follow`` those that a trainer adds until the last step; name what is none."""
    seen: set[int] = set()
    told = -1
    while True:
        is_trained = is_locked(run)  # asked first: what its trainer writes before it goes is in the list
        for step, path in list_checkpoints(run / "checkpoints"):
            if step not in seen:
                seen.add(step)
                yield step, path
        if not follow or last in seen:
            break
        newest = max(seen, default=0)
        if not is_trained:
            note(f"no trainer runs in {run}, whose newest checkpoint is of step {newest:,} of {last:,}")
            break
        if newest != told:
            note(f"waiting for step {last:,}; the newest checkpoint is of step {newest:,}")
            told = newest
        time.sleep(_POLL_SECONDS)
    for path in sorted((run / "checkpoints").glob("step-*")):
        if re.fullmatch(r"step-\d+", path.name) and _is_gone(path):
            note(f"step {int(path.name.removeprefix('step-')):,}: no {MANIFEST_NAME}, passed over")


def _is_gone(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is not whole: its manifest comes last and goes first."""
    return not (checkpoint / MANIFEST_NAME).is_file()


def _facts(run: Path, step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * _tokens_per_step(run)}


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


def _directory(name: str, model: ModelFiles | MobiLlamaError, settings: Settings, out: Path | None) -> Path:
    """Return where a model's evaluation is kept: beside its run's checkpoints unless ``out`` is named."""
    if not isinstance(model, ModelFiles):
        return (out or _OUT) / settings.suite / settings.named(_file_name(name))
    checkpoint = model.directory.resolve().parent
    if out is None and re.fullmatch(r"step-\d+", checkpoint.name) and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "evals" / settings.suite / settings.named(checkpoint.name)
    return (out or _OUT) / settings.suite / settings.named(f"{_file_name(model.name)}-{model.digest[:8]}")


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
