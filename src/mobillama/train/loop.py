"""The life of a pre-training run, from recipe to last checkpoint, readable from top to bottom."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from mobillama.config import flatten, read_mapping, resolved, to_yaml
from mobillama.data.dataset import Dataset, partition
from mobillama.errors import CorruptDataError, DivergedError, Stopped, UsageError
from mobillama.model.loss import linear_cross_entropy
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import RESUMABLE_CHANGES, PretrainRecipe
from mobillama.record.environment import environment
from mobillama.record.files import read_json, sha256_json, write_json, write_text
from mobillama.record.lock import locked
from mobillama.train.checkpoint import (
    keep_newest,
    load_checkpoint,
    newest_whole_checkpoint,
    read_state,
    remove_leftovers,
    save_checkpoint,
)
from mobillama.train.device import autocast_to, choose_device, choose_precision, describe_device, keep_freed_memory
from mobillama.train.optimizer import build_optimizers, learning_rate
from mobillama.train.validation import combined, document_ids, validate

METRICS_FILE = "metrics.jsonl"


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
        self.device = choose_device(recipe.train.device)
        self.precision = choose_precision(recipe.train.precision, self.device)
        self.autocast = autocast_to(self.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        model = MobiLlama(recipe.model)
        initialise(model, recipe.model, recipe.seed)
        self.model = model.to(self.device)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.eos_id = dataset.tokenizer.eos_id if recipe.train.mask_documents else None
        decoder = self.model.model
        self.decoder: Callable[..., torch.Tensor] = torch.compile(decoder) if recipe.train.compile else decoder
        self.tokens_per_step = recipe.train.batch_size * (dataset.sequence_length - 1)

    def execute(self) -> Path:
        """Train from where the run stands to its last step."""
        recipe, steps = self.recipe, self.recipe.train.steps
        path, done = self._resume()
        if path is not None and done >= steps:
            self.reporter.on_note(f"{path}: all {steps} steps are done")
            return path
        self.reporter.on_start(done, steps)
        with open(self.run / METRICS_FILE, "a", encoding="utf-8") as self.metrics, _stop_flag(self.reporter) as stop:
            for step in range(done, steps):
                self._record(self._train_step(step))
                done = step + 1
                last = done == steps
                if recipe.train.validate_every and (last or done % recipe.train.validate_every == 0):
                    self._validate(done)
                if last or stop.requested or done % recipe.train.checkpoint_every == 0:
                    path = self._save(done)
                if stop.requested and not last:
                    raise Stopped(f"{path}: saved after step {done}; run the same command again to go on")
        assert path is not None
        return path

    def _resume(self) -> tuple[Path | None, int]:
        for leftover in remove_leftovers(self.checkpoints):
            self.reporter.on_note(f"{leftover}: an interrupted save, removed")
        path, damaged = newest_whole_checkpoint(self.checkpoints)
        for line in damaged:
            self.reporter.on_note(f"{line}; using an older checkpoint")
        metrics = self.run / METRICS_FILE
        if path is None:
            if _recorded_steps(metrics) > self.recipe.train.checkpoint_every:
                raise UsageError(
                    f"{metrics}: records {_recorded_steps(metrics)} steps, but {self.checkpoints} holds no checkpoint; "
                    f"restore them, or remove {self.run} to start anew"
                )
            metrics.unlink(missing_ok=True)
            return None, 0
        state = read_state(path)
        if state["precision"] != self.precision:
            raise UsageError(
                f"{path}: was computed in {state['precision']}, this machine would go on in {self.precision}; "
                f"set train.precision to {state['precision']}"
            )
        load_checkpoint(path, self.model, self.optimizers)
        if not metrics.is_file() or metrics.stat().st_size < state["metrics_bytes"]:
            raise CorruptDataError(f"{metrics}: shorter than when {path.name} was saved; restore it from a copy")
        os.truncate(metrics, state["metrics_bytes"])
        self.reporter.on_note(f"resuming after step {state['step']} from {path}")
        return path, state["step"]

    def _train_step(self, step: int) -> dict[str, Any]:
        """Take optimizer step ``step`` (from 0) and return its record."""
        recipe, started = self.recipe, time.perf_counter()
        rate = learning_rate(recipe.optimizer, step, recipe.train.steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        by_source = torch.zeros(len(self.dataset.source_names), dtype=torch.float64, device=self.device)
        sequences = torch.zeros_like(by_source)
        for part in partition(recipe.train.batch_size, recipe.train.micro_batch_size):
            batch = self.dataset.batch(recipe.seed, step, recipe.train.batch_size, part)
            ids = torch.from_numpy(batch.ids).to(self.device)
            sources = torch.from_numpy(batch.sources).to(self.device)
            with self.autocast():
                hidden_btc = self.decoder(ids[:, :-1], document_ids=document_ids(ids[:, :-1], self.eos_id))
                total, losses_bt = linear_cross_entropy(
                    hidden_btc, self.model.lm_head.weight, ids[:, 1:], recipe.train.z_loss
                )
            torch.autograd.backward(total / self.tokens_per_step)
            by_source.index_add_(0, sources, losses_bt.double().sum(1))
            sequences.index_add_(0, sources, torch.ones_like(sources, dtype=torch.float64))
        limit = recipe.optimizer.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        loss = float(by_source.sum()) / self.tokens_per_step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; lower optimizer.learning_rate and start a new run, "
                f"or look at this step's data: mobillama data show {self.run} --step {step + 1}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens_of_source = (sequences * (self.dataset.sequence_length - 1)).tolist()
        means = zip(self.dataset.source_names, by_source.tolist(), tokens_of_source, strict=True)
        return {
            "kind": "step",
            "step": step + 1,
            "loss": loss,
            "loss_by_source": {name: nats / tokens for name, nats, tokens in means if tokens},
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": (step + 1) * self.tokens_per_step,
            "tokens_per_second": self.tokens_per_step / (time.perf_counter() - started),
        }

    def _validate(self, step: int) -> None:
        micro, limit = self.recipe.train.micro_batch_size, self.recipe.train.validate_sequences
        losses = validate(self.model, self.dataset, self.device, self.autocast, micro, limit, eos_id=self.eos_id)
        if losses:
            record = {"kind": "validation", "step": step, "loss": combined(losses).loss}
            record["bits_per_byte"] = combined(losses).bits_per_byte
            record["bits_per_byte_by_source"] = {name: loss.bits_per_byte for name, loss in losses.items()}
            self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        self.reporter.on_record(record)

    def _save(self, step: int) -> Path:
        os.fsync(self.metrics.fileno())
        state = {
            "data": self.dataset.digest,
            "recipe": resolved(self.recipe),
            "precision": self.precision,
            "tokens": step * self.tokens_per_step,
            "metrics_bytes": os.fstat(self.metrics.fileno()).st_size,
            "environment": self.environment,
        }
        path = save_checkpoint(
            self.checkpoints, step, self.recipe.model, self.model, self.optimizers, self.dataset.tokenizer, state
        )
        keep_newest(self.checkpoints, step, self.recipe.train.keep_checkpoints)
        return path


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
            if before.get(key) != now.get(key) and key not in RESUMABLE_CHANGES | {"data", "run"}:
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
