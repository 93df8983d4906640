"""The life of a training run, from recipe to last checkpoint, readable from top to bottom."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from mobillama.config import flatten, read_mapping, resolved, to_yaml
from mobillama.errors import DivergedError, Stopped, UsageError
from mobillama.recipe import RESUMABLE_CHANGES, PretrainRecipe
from mobillama.record.environment import environment
from mobillama.record.files import read_json, sha256_json, write_json, write_text
from mobillama.record.lock import locked
from mobillama.train.cadence import checkpoint_due
from mobillama.train.checkpoint import (
    checkpoint_path,
    load_optimizers,
    load_tensors,
    newest_whole_checkpoint,
    read_state,
    remove_leftovers,
)
from mobillama.train.device import DETERMINISTIC_COST, describe_device
from mobillama.train.faults import Watch
from mobillama.train.meters import Meters
from mobillama.train.records import METRICS_FILE, Records, recorded_steps
from mobillama.train.saver import Saver
from mobillama.train.signals import stop_flag
from mobillama.train.sinks import open_sink
from mobillama.train.step import Stepper
from mobillama.train.task import Pretraining, Recipe, Task
from mobillama.train.validation import combined, validate
from mobillama.train.weights import Movement, fingerprint
from mobillama.train.world import World, join_world

_LONG = 1.0  # seconds that a checkpoint may hold training up before a person is told


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
    """Pre-train as ``recipe`` says; see :func:`train`."""
    return train(Pretraining(recipe), reporter)


def train(task: Task, reporter: Reporter) -> Path:
    """Run a task to its end, from the newest whole checkpoint of its run directory; return the last checkpoint.

    Under torchrun all processes call it; the first one's reporter is told.

    Args:
        task: what is trained.
        reporter: told of every record.

    Raises:
        UsageError: recipe and data do not fit, the run directory belongs to another recipe or another process, or is none.
        CorruptDataError: data or every checkpoint is damaged.
        DivergedError: a loss or gradient norm is not finite; the last checkpoint stays as it was.
        Stopped: SIGINT or SIGTERM came; the run saved itself.
    """
    run = Path(task.recipe.run)
    with join_world(task.recipe.train.device) as world, ExitStack() as held:

        def claim() -> dict[str, Any]:
            task.check(world)
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run, "a trainer"))
            task.prepare()
            task.open()
            facts = {**environment(), "device": describe_device(world.device), "processes": world.size}
            facts["recipe_sha256"] = sha256_json(resolved(task.recipe))
            _claim(run, task, facts)
            return facts

        facts = world.share(claim)
        if not world.is_first:
            task.open()
        return _Run(task, run, world, reporter if world.is_first else Silent(), facts).execute()


class _Run:
    """State of a run in one process."""

    def __init__(
        self,
        task: Task,
        run: Path,
        world: World,
        reporter: Reporter,
        facts: dict[str, Any],
    ) -> None:
        self.task, self.world, self.reporter, self.environment = task, world, reporter, facts
        self.recipe, self.dataset = recipe, dataset = task.recipe, task.data
        self.checkpoints = run / "checkpoints"
        self.stepper = Stepper(task, world, reporter.on_note)
        self.watch = Watch(recipe.faults)
        keep, keep_every = recipe.train.keep_checkpoints, recipe.train.keep_every
        self.saver = Saver(self.checkpoints, world, task.save_weights, keep, keep_every, reporter.on_note)
        self.is_due = checkpoint_due(recipe.train, dataset.sequence_length - 1, dataset.chunk_ends)
        self.meters = Meters(world, task.shape, dataset.sequence_length - 1)
        sink = open_sink(recipe.train.sink, run, flatten(resolved(recipe))) if world.is_first else None
        self.records = Records(run, world.is_first, sink, reporter.on_note)

    def execute(self) -> Path:
        """Train from where the run stands to its last step."""
        recipe, train = self.recipe, self.recipe.train
        path, done = self._resume()
        if done >= train.steps:
            self.reporter.on_note(f"{path}: all {train.steps} steps are done")
        else:
            self._tell_costs()
            self.reporter.on_start(done, train.steps)
        first = {
            "kind": "run",
            "recipe": sha256_json(defining(recipe)),
            "data": self.dataset.digest,
            "root": self.dataset.root.hex(),
            **self.task.facts,
        }
        with (
            closing(self.stepper.loader),
            closing(self.saver),
            self.records.open(first),
            stop_flag(self.reporter.on_note) as stop,
        ):
            if done < train.steps:
                self.saver.reserve(self.stepper.model, self.stepper.optimizers)
                if self.world.is_first:
                    _ = (
                        self.dataset.tokenizer.files
                    )  # made now: beside training it would keep Python's lock for half a second
            if path is not None:
                self.saver.resume(path)
            while done < train.steps:
                said = self._take_step(done)
                done += 1
                if self.watch.must_roll_back:
                    done = self._roll_back(done, said)
                    continue
                last = done == train.steps
                if train.validate_every and (last or done % train.validate_every == 0):
                    self._validate(done)
                stops, failures = self._flags(stop.requested, self.saver.failed)
                if failures:
                    self._finish_save()
                if last or stops or self.is_due(done):
                    self._save(done)
                if stops and not last:
                    self._finish_save()
                    saved = checkpoint_path(self.checkpoints, done)
                    said = f"{saved}: saved after step {done}; run the same command again to go on"
                    raise Stopped(said if self.world.is_first else "")
            self._finish_save()
        return checkpoint_path(self.checkpoints, done)

    def _tell_costs(self) -> None:
        if formula := self.meters.describe():
            self.reporter.on_note(formula)
        cost, gpu = DETERMINISTIC_COST[self.recipe.train.fused]
        if self.recipe.train.deterministic and self.world.device.type == "cuda":
            self.reporter.on_note(
                f"train.deterministic: steps can be repeated to the bit, which took {cost:.0%} of the speed of mobillama-0.5b "
                f"on an {gpu}"
            )

    def _flags(self, *flags: bool) -> list[bool]:
        """Return which of the flags are up in any process."""
        return [bool(count) for count in self.world.sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def _resume(self) -> tuple[Path | None, int]:
        def find() -> str:
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in remove_leftovers(self.checkpoints):
                self.reporter.on_note(f"{leftover}: an interrupted save, removed")
            path, damaged = newest_whole_checkpoint(self.checkpoints)
            for line in damaged:
                self.reporter.on_note(f"{line}; using an older checkpoint")
            if path is None:
                self._check_fresh()
                self.records.truncate(None)
                return ""
            state = read_state(path)
            if state["precision"] != self.stepper.precision:
                raise UsageError(
                    f"{path}: was computed in {state['precision']}, this machine would go on in {self.stepper.precision}; "
                    f"set train.precision to {state['precision']}"
                )
            self.records.truncate(state["bytes"])
            return str(path)

        found = self.world.share(find)
        if not found:
            return None, 0
        path = Path(found)
        state = self._load(path)
        self.watch.load(state["faults"])
        self.reporter.on_note(f"resuming after step {state['step']} from {path}")
        return path, state["step"]

    def _check_fresh(self) -> None:
        """Refuse to start anew where there must have been a checkpoint: the first is whole when the second is begun."""
        run, steps = self.records.run, recorded_steps(self.records.run)
        if sum(map(self.is_due, range(1, steps))) > 1:
            raise UsageError(
                f"{run / METRICS_FILE}: records {steps} steps, but {self.checkpoints} holds no checkpoint; "
                f"restore them, or remove {run} to start anew"
            )

    def _load(self, path: Path) -> dict[str, Any]:
        model = self.stepper.model
        load_tensors(path / self.task.weights_directory, self.task.stored_weights(model))
        load_optimizers(path, model, self.stepper.optimizers)
        return read_state(path)

    def _take_step(self, step: int) -> str:
        """Take optimizer step ``step`` (from 0), unless it is bad or to be passed over, and record it.

        Returns:
            What was wrong with it, or ``""``.
        """
        train, rate = self.recipe.train, self.stepper.rate(step)
        first = step * train.batch_size
        entry: dict[str, Any] = {"kind": "step", "step": step + 1, "positions": [first, first + train.batch_size]}
        record: dict[str, Any] = {"kind": "step", "step": step + 1}
        tokens = {"tokens": (step + 1) * self.stepper.tokens}
        if step < self.watch.passed_over:
            self.records.chain({**entry, "fault": "passed over"})
            self._report({**record, "fault": "passed over", **tokens})
            return ""
        waited = self.stepper.loader.waited
        inspects = bool(train.inspect_every) and (step + 1) % train.inspect_every == 0
        computed_step = self.stepper.gradient(step, self.watch.limit)
        movement = Movement(self.stepper.model, self.world) if inspects else None
        self.stepper.update(rate, computed_step)  # before the numbers are here: the device knows a bad step by itself
        look = self.meters.look()
        numbers = computed_step.numbers()
        fault = self.watch.judge(numbers.loss, numbers.gradient_norm)
        moved = {"update_ratio": movement.ratios()} if movement and not fault else {}
        computed = {
            "loss": _finite(numbers.loss),
            "loss_by_source": {name: _finite(loss) for name, loss in numbers.loss_by_source.items()},
            "learning_rate": rate,
            "gradient_norm": _finite(numbers.gradient_norm),
            **({"fault": fault} if fault else {}),
        }
        prints = {"weights": fingerprint(self.stepper.model.state_dict(), self.world)} if inspects else {}
        self.records.chain({**entry, **computed, **prints})
        facts = self.meters.read(self.stepper.tokens, self.stepper.loader.waited - waited, look)
        more = {"bits_per_byte": _finite(numbers.bits_per_byte), **moved}
        self._report({**record, **computed, **tokens, **more, **facts})
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
        self._finish_save()
        path = self.world.share(lambda: str(newest_whole_checkpoint(self.checkpoints)[0] or ""))
        if self.watch.rollbacks >= self.recipe.faults.max_rollbacks or not path:
            remedy = (
                f"step {done}: {said}, and faults allows no more; lower optimizer.learning_rate and start a new run, set "
                "faults.max_skips or faults.max_rollbacks, or look at this step's data: mobillama data show "
                f"{self.records.run} --step {done}"
            )
            raise DivergedError(remedy if self.world.is_first else "")
        state = self._load(Path(path))
        rollbacks = self.watch.rollbacks
        self.watch.load({**state["faults"], "rollbacks": rollbacks})
        self.watch.roll_back(done)
        entry = {"kind": "rollback", "step": done, "to": state["step"]}
        self.records.chain(entry)
        self._report(entry)
        self.reporter.on_note(f"step {done}: rolled back to {path}; the data up to here are passed over")
        return int(state["step"])

    def _validate(self, step: int) -> None:
        self.meters.look()  # at the steps up to here
        micro, limit = self.recipe.train.micro_batch_size, self.recipe.train.validate_sequences
        losses = validate(self.stepper.losses, self.dataset, self.world, micro, limit)
        if losses:
            record = {"kind": "validation", "step": step, "loss": combined(losses).loss}
            record["bits_per_byte"] = combined(losses).bits_per_byte
            record["bits_per_byte_by_source"] = {name: loss.bits_per_byte for name, loss in losses.items()}
            self.records.chain(record)
            self._report(record)
        self.meters.restart()

    def _report(self, record: dict[str, Any]) -> None:
        self.records.add(record)
        self.reporter.on_record(record)

    def _save(self, step: int) -> None:
        """Begin a checkpoint. Its lines come into the records before the next one's, however long its files take."""
        self.meters.look()  # at the steps up to here
        self._finish_save()
        state = {
            "data": self.dataset.digest,
            "recipe": resolved(self.recipe),
            "precision": self.stepper.precision,
            "tokens": step * self.stepper.tokens,
            **self.records.state(),
            "faults": self.watch.state(),
            "environment": self.environment,
        }
        self.saver.start(step, self.stepper.model, self.stepper.optimizers, state)
        self.meters.restart()

    def _finish_save(self) -> None:
        """Wait for the checkpoint under way, or after a resume for the one that was resumed from, and record it.

        Raises:
            UsageError: it cannot be written.
        """
        saved = self.saver.wait()
        if saved is None:
            return
        self.records.chain({"kind": "checkpoint", "step": saved.step, **saved.digests})
        self._report({"kind": "checkpoint", "step": saved.step, "seconds": saved.seconds, "held_up": saved.held_up})
        if saved.held_up > _LONG:
            self.reporter.on_note(
                f"step {saved.step}: training stood still for {saved.held_up:.0f} s of the {saved.seconds:.0f} s that its "
                f"checkpoint took; for fewer, save less often (train.checkpoint_every) or to faster storage"
            )


def defining(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe that decide what a run computes, by dotted key."""
    return {key: value for key, value in flatten(resolved(recipe)).items() if key not in RESUMABLE_CHANGES}


def _claim(run: Path, task: Task, facts: dict[str, Any]) -> None:
    """Write what the run is, or check that a started run is the same one; a refused run's files stay as they are."""
    recipe, dataset = task.recipe, task.data
    stated, data = run / "recipe.yaml", run / "data-manifest.json"
    if stated.is_file() and recorded_steps(run):
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no others
