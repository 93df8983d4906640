"""The life of a pre-training run, from recipe to last checkpoint, readable from top to bottom."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mobillama.config import flatten, read_mapping, resolved, to_yaml
from mobillama.data.dataset import Dataset
from mobillama.errors import CorruptDataError, DivergedError, Stopped, UsageError
from mobillama.recipe import RESUMABLE_CHANGES, PretrainRecipe
from mobillama.record.chain import START as CHAIN_START
from mobillama.record.chain import Chain
from mobillama.record.environment import environment
from mobillama.record.files import read_json, sha256_json, write_json, write_text
from mobillama.record.lock import locked
from mobillama.record.manifest import MANIFEST_NAME
from mobillama.train.checkpoint import (
    keep_newest,
    load_checkpoint,
    newest_whole_checkpoint,
    read_state,
    remove_leftovers,
    save_checkpoint,
)
from mobillama.train.device import choose_device, describe_device
from mobillama.train.faults import Watch
from mobillama.train.step import Stepper
from mobillama.train.validation import combined, validate

METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.jsonl"


class Reporter(Protocol):
    """Who is told how a run goes (the terminal, a test, nobody)."""

    def on_start(self, first_step: int, steps: int) -> None:
        """The loop starts after ``first_step`` of ``steps`` steps."""

    def on_record(self, record: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def on_note(self, text: str) -> None:
        """Something a person should read happened."""


@dataclass
class Silent:
    """A reporter that keeps the notes and shows nothing."""

    notes: list[str] = field(default_factory=list)

    def on_start(self, first_step: int, steps: int) -> None:
        """Show nothing."""

    def on_record(self, record: dict[str, Any]) -> None:
        """Show nothing."""

    def on_note(self, text: str) -> None:
        """Keep the note."""
        self.notes.append(text)


def pretrain(recipe: PretrainRecipe, reporter: Reporter) -> Path:
    """Run ``recipe`` to its end, from the newest whole checkpoint of its run directory; return the last checkpoint.

    Args:
        recipe: the run.
        reporter: told of every record.

    Raises:
        UsageError: recipe and data do not fit, the run directory belongs to another recipe or another process, or is none.
        CorruptDataError: data or every checkpoint is damaged.
        DivergedError: a loss or gradient norm is not finite; the last checkpoint stays as it was.
        Stopped: SIGINT or SIGTERM came; the run saved itself.
    """
    dataset = Dataset(Path(recipe.data))
    dataset.check_sizes()
    _check_fit(recipe, dataset)
    device = choose_device(recipe.train.device)
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, "a trainer"):
        facts = {**environment(), "device": describe_device(device), "recipe_sha256": sha256_json(resolved(recipe))}
        _claim(run, recipe, dataset, facts)
        return _Run(recipe, dataset, run, reporter, facts).execute()


class _Run:
    """State of a run in one process."""

    def __init__(
        self, recipe: PretrainRecipe, dataset: Dataset, run: Path, reporter: Reporter, facts: dict[str, Any]
    ) -> None:
        self.recipe, self.dataset, self.run, self.reporter, self.environment = recipe, dataset, run, reporter, facts
        self.checkpoints = run / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.stepper = Stepper(recipe, dataset)
        self.watch = Watch(recipe.faults)

    def execute(self) -> Path:
        """Train from where the run stands to its last step."""
        recipe, steps = self.recipe, self.recipe.train.steps
        path, done = self._resume()
        if path is not None and done >= steps:
            self.reporter.on_note(f"{path}: all {steps} steps are done")
            return path
        self.reporter.on_start(done, steps)
        with self._records(), _stop_flag(self.reporter) as stop:
            if path is not None:
                self._chain_checkpoint(path)  # cut off with what came after it was saved
            while done < steps:
                said = self._take_step(done)
                done += 1
                if self.watch.must_roll_back:
                    done = self._roll_back(done, said)
                    continue
                last = done == steps
                if recipe.train.validate_every and (last or done % recipe.train.validate_every == 0):
                    self._validate(done)
                if last or stop.requested or done % recipe.train.checkpoint_every == 0:
                    path = self._save(done)
                if stop.requested and not last:
                    raise Stopped(f"{path}: saved after step {done}; run the same command again to go on")
        assert path is not None
        return path

    @contextmanager
    def _records(self) -> Iterator[None]:
        """Keep metrics.jsonl and the ledger open for appending."""
        self.ledger = Chain(self.run / LEDGER_FILE)
        try:
            if self.ledger.head == CHAIN_START:
                self.ledger.append(
                    {
                        "kind": "run",
                        "recipe": sha256_json(defining(self.recipe)),
                        "data": self.dataset.digest,
                        "root": self.dataset.root.hex(),
                    }
                )
            with open(self.run / METRICS_FILE, "a", encoding="utf-8") as self.metrics:
                yield
        finally:
            self.ledger.close()

    def _resume(self) -> tuple[Path | None, int]:
        for leftover in remove_leftovers(self.checkpoints):
            self.reporter.on_note(f"{leftover}: an interrupted save, removed")
        path, damaged = newest_whole_checkpoint(self.checkpoints)
        for line in damaged:
            self.reporter.on_note(f"{line}; using an older checkpoint")
        metrics, ledger = self.run / METRICS_FILE, self.run / LEDGER_FILE
        if path is None:
            if _recorded_steps(metrics) > self.recipe.train.checkpoint_every:
                raise UsageError(
                    f"{metrics}: records {_recorded_steps(metrics)} steps, but {self.checkpoints} holds no checkpoint; "
                    f"restore them, or remove {self.run} to start anew"
                )
            metrics.unlink(missing_ok=True)
            ledger.unlink(missing_ok=True)
            return None, 0
        state = read_state(path)
        if state["precision"] != self.stepper.precision:
            raise UsageError(
                f"{path}: was computed in {state['precision']}, this machine would go on in {self.stepper.precision}; "
                f"set train.precision to {state['precision']}"
            )
        for file in (metrics, ledger):
            if not file.is_file() or file.stat().st_size < state["bytes"][file.name]:
                raise CorruptDataError(f"{file}: shorter than when {path.name} was saved; restore it from a copy")
        load_checkpoint(path, self.stepper.model, self.stepper.optimizers)
        self.watch.load(state["faults"])
        for file in (metrics, ledger):
            os.truncate(file, state["bytes"][file.name])
        self.reporter.on_note(f"resuming after step {state['step']} from {path}")
        return path, state["step"]

    def _take_step(self, step: int) -> str:
        """Take optimizer step ``step`` (from 0), unless it is bad or to be passed over, and record it.

        Returns:
            What was wrong with it, or ``""``.
        """
        train, started, rate = self.recipe.train, time.perf_counter(), self.stepper.rate(step)
        first = step * train.batch_size
        entry: dict[str, Any] = {"kind": "step", "step": step + 1, "positions": [first, first + train.batch_size]}
        record: dict[str, Any] = {"kind": "step", "step": step + 1}
        tokens = {"tokens": (step + 1) * self.stepper.tokens}
        if step < self.watch.passed_over:
            self.ledger.append({**entry, "fault": "passed over"})
            self._record({**record, "fault": "passed over", **tokens})
            return ""
        numbers = self.stepper.gradient(step)
        fault = self.watch.judge(numbers.loss, numbers.gradient_norm)
        if fault:
            self.stepper.discard()
        else:
            self.stepper.update(rate)
        computed = {
            "loss": _finite(numbers.loss),
            "loss_by_source": {name: _finite(loss) for name, loss in numbers.loss_by_source.items()},
            "learning_rate": rate,
            "gradient_norm": _finite(numbers.gradient_norm),
            **({"fault": fault} if fault else {}),
        }
        self.ledger.append({**entry, **computed})
        speed = self.stepper.tokens / (time.perf_counter() - started)
        self._record({**record, **computed, **tokens, "tokens_per_second": speed})
        said = f"loss {numbers.loss:.4g}, gradient norm {numbers.gradient_norm:.4g}" if fault else ""
        if fault:
            self.reporter.on_note(f"step {step + 1}: {fault} ({said}), skipped")
        return said

    def _roll_back(self, done: int, said: str) -> int:
        """Go back to the newest checkpoint, from where the steps up to ``done`` are passed over; return its step.

        ``said`` is what was wrong with the last of them.

        Raises:
            DivergedError: the policy allows no rollback, or no further one.
        """
        path, _ = newest_whole_checkpoint(self.checkpoints)
        if self.watch.rollbacks >= self.recipe.faults.max_rollbacks or path is None:
            raise DivergedError(
                f"step {done}: {said}, and faults allows no more; lower optimizer.learning_rate and start a new run, set "
                "faults.max_skips or faults.max_rollbacks, or look at this step's data: mobillama data show "
                f"{self.run} --step {done}"
            )
        state = read_state(path)
        load_checkpoint(path, self.stepper.model, self.stepper.optimizers)
        rollbacks = self.watch.rollbacks
        self.watch.load({**state["faults"], "rollbacks": rollbacks})
        self.watch.roll_back(done)
        entry = {"kind": "rollback", "step": done, "to": state["step"]}
        self.ledger.append(entry)
        self._record(entry)
        self.reporter.on_note(f"step {done}: rolled back to {path}; the data up to here are passed over")
        return int(state["step"])

    def _validate(self, step: int) -> None:
        micro, limit = self.recipe.train.micro_batch_size, self.recipe.train.validate_sequences
        at = self.stepper
        losses = validate(at.model, self.dataset, at.device, at.autocast, micro, limit, eos_id=at.eos_id)
        if losses:
            record = {"kind": "validation", "step": step, "loss": combined(losses).loss}
            record["bits_per_byte"] = combined(losses).bits_per_byte
            record["bits_per_byte_by_source"] = {name: loss.bits_per_byte for name, loss in losses.items()}
            self.ledger.append(record)
            self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        self.reporter.on_record(record)

    def _save(self, step: int) -> Path:
        os.fsync(self.metrics.fileno())
        lengths = {METRICS_FILE: os.fstat(self.metrics.fileno()).st_size, LEDGER_FILE: self.ledger.sync()}
        state = {
            "data": self.dataset.digest,
            "recipe": resolved(self.recipe),
            "precision": self.stepper.precision,
            "tokens": step * self.stepper.tokens,
            "bytes": lengths,
            "ledger": self.ledger.head,
            "faults": self.watch.state(),
            "environment": self.environment,
        }
        model, optimizers, tokenizer = self.stepper.model, self.stepper.optimizers, self.dataset.tokenizer
        path = save_checkpoint(self.checkpoints, step, self.recipe.model, model, optimizers, tokenizer, state)
        self._chain_checkpoint(path)
        keep_newest(self.checkpoints, step, self.recipe.train.keep_checkpoints)
        return path

    def _chain_checkpoint(self, path: Path) -> None:
        manifest = read_json(path / MANIFEST_NAME)
        digests = {name: fact["sha256"] for name, fact in manifest["files"].items() if name.endswith(".safetensors")}
        self.ledger.append({"kind": "checkpoint", "step": manifest["step"], "sha256": digests})


def defining(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return the settings of a recipe that decide what a run computes, by dotted key."""
    return {key: value for key, value in flatten(resolved(recipe)).items() if key not in RESUMABLE_CHANGES}


def _check_fit(recipe: PretrainRecipe, dataset: Dataset) -> None:
    """Refuse a model that cannot learn this data, and data whose tokenizer is damaged."""
    ids = dataset.tokenizer.vocab_size
    if recipe.model.vocab_size != ids:
        raise UsageError(
            f"model.vocab_size: {recipe.model.vocab_size}, but the tokenizer of {dataset.path} has {ids} ids; "
            f"set model.vocab_size to {ids}"
        )
    context = dataset.sequence_length - 1
    if recipe.model.max_position_embeddings < context:
        raise UsageError(
            f"model.max_position_embeddings: {recipe.model.max_position_embeddings} is shorter than the {context} tokens "
            f"that {dataset.path} holds in a sequence; set it to {context} or more"
        )


def _claim(run: Path, recipe: PretrainRecipe, dataset: Dataset, facts: dict[str, Any]) -> None:
    """Write what the run is, or check that a started run is the same one; a refused run's files stay as they are."""
    stated, data = run / "recipe.yaml", run / "data-manifest.json"
    if stated.is_file() and _recorded_steps(run / METRICS_FILE):
        before, now = flatten(read_mapping(stated)), flatten(resolved(recipe))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in RESUMABLE_CHANGES:
                raise UsageError(
                    f"{stated}: this run has {key} = {before.get(key)}, the recipe says {now.get(key)}; "
                    "use another run directory or the run's own recipe"
                )
        if read_json(data).get("digest") != dataset.digest:
            raise UsageError(
                f"{data}: this run learns from other data than {dataset.path}; point 'data' to the same data set"
            )
        return
    write_text(stated, to_yaml(recipe))
    write_json(data, dataset.manifest)
    write_json(run / "environment.json", facts)


def _recorded_steps(metrics: Path) -> int:
    """Return the last step that metrics.jsonl records; a line cut short by a kill does not count."""
    if not metrics.is_file():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (ValueError, KeyError, TypeError):
        raise CorruptDataError(f"{metrics}: its last line is no record of a step; restore it from a copy") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no others


@dataclass
class _StopFlag:
    requested: bool = False


@contextmanager
def _stop_flag(reporter: Reporter) -> Iterator[_StopFlag]:
    """Turn the first SIGINT or SIGTERM into a request; a second one ends the process at once."""
    flag = _StopFlag()

    def request(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        reporter.on_note("stopping after this step and saving; once more stops at once, without saving")

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
