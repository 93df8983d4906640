"""One optimizer step: the batch through the model, its gradient, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobillama.data.dataset import Batch
from mobillama.errors import UsageError
from mobillama.train.device import (
    autocast_to,
    choose_precision,
    describe_device,
    has_float8,
    keep_freed_memory,
    make_deterministic,
    read_later,
)
from mobillama.train.fused import fuse_layers
from mobillama.train.hopper import require_hopper
from mobillama.train.loader import Loader
from mobillama.train.objective import Objective
from mobillama.train.optimizer import apply_gradient, build_optimizers, gradient_norm, learning_rate
from mobillama.train.parallel import distribute, keep_gradients_local
from mobillama.train.speed import checkpoint_activations, compile_layers, use_float8
from mobillama.train.task import Task
from mobillama.train.world import World


@dataclass(frozen=True)
class StepNumbers:
    """What a step computed over all processes."""

    loss: float
    """Nats per token."""
    loss_by_source: dict[str, float]
    bits_per_byte: float
    gradient_norm: float
    """Before clipping."""


@dataclass(frozen=True)
class Computed:
    """A step's gradient as the device knows it."""

    is_good: Tensor
    """Whether it may be applied, ()."""
    norm: Tensor
    """Of the whole gradient, in float64, ()."""
    _read: Callable[[], list[float]]
    _numbers: Callable[[list[float]], StepNumbers]

    def numbers(self) -> StepNumbers:
        """Wait for what the step computed."""
        return self._numbers(self._read())


class Stepper:
    """This process's model, or its share of it, and its optimizers.

    Args:
        task: what is trained, open.
        world: the processes that share a step; their number divides the batch.
        on_note: told what a person should read.

    Raises:
        UsageError: the device lacks what the recipe asks for.
    """

    def __init__(
        self,
        task: Task,
        world: World,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        recipe, dataset, train = task.recipe, task.data, task.recipe.train
        self.recipe, self.dataset, self.world, self.device = recipe, dataset, world, world.device
        if train.deterministic:
            make_deterministic()
        if train.float8 and not has_float8(self.device):
            raise UsageError(f"train.float8: {describe_device(self.device)} multiplies no float8; set it to false")
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = choose_precision(train.precision, self.device)
        self.tokens = train.batch_size * (dataset.sequence_length - 1)
        self.loader = Loader(dataset, recipe.seed, train.batch_size, train.micro_batch_size, world, on_note)

        self.model = task.build().to(self.device)
        if train.fused:
            require_hopper(self.device, self.precision, task.shape, dataset.sequence_length - 1, train.float8)
        else:
            if train.float8:
                use_float8(self.model)
            checkpoint_activations(self.model.model, train.activation_checkpointing)
        if train.compile:
            compile_layers(self.model.model)
        if train.fused:
            fuse_layers(self.model.model, train.float8, recompute=train.activation_checkpointing == "full")
        eos_id = dataset.tokenizer.eos_id if train.mask_documents else -1
        precision = autocast_to(self.precision, self.device)
        objective = Objective(self.model, train.z_loss, train.mask_documents, eos_id, precision)
        self._objective = distribute(objective, world, train.parallelism, train.shard_ranks)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)

    def rate(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        return learning_rate(self.recipe.optimizer, step, self.recipe.train.steps)

    def gradient(self, step: int, limit: float = math.inf) -> Computed:
        """Compute the gradient of step ``step`` (from 0) into the parameters; a GPU is not waited for.

        Args:
            step: which sequences.
            limit: the update is left out if the gradient's norm is above it, or loss or norm are not finite.
        """
        nats = torch.zeros(len(self.dataset.source_names), dtype=torch.float64, device=self.device)
        counts, size = torch.zeros_like(nats), 0
        learned = self.dataset.learned_tokens(self.recipe.seed, step, self.recipe.train.batch_size)
        batches = self.loader.take(step)
        placed = self._on_device(batches)
        for number, (ids, marks, sources) in enumerate(placed, start=1):
            keep_gradients_local(self._objective, number < len(placed))
            total, losses_bt = self._objective(ids, marks)
            if number == 1:
                # A reader takes Python's lock from the thread that gives a GPU its work: not while the GPU has none.
                self.loader.read_ahead(step + 1)
            # Processes' gradients are averaged, and the loss is the mean over all of them.
            torch.autograd.backward(total * self.world.size / learned)
            nats.index_add_(0, sources, losses_bt.double().sum(1))
            counts.index_add_(0, sources, _learned_in(ids, marks))
            size += int(self.dataset.token_lengths[batches[number - 1].learned_ids()].sum())
        norm = gradient_norm(self.model)
        sums = self.world.sum(torch.cat([nats, counts, torch.full_like(nats[:1], size)]))
        is_good = sums[: len(nats)].sum().isfinite() & norm.isfinite() & (norm <= limit)
        return Computed(is_good, norm, read_later(torch.cat([sums, norm[None]])), self._numbers)

    def _numbers(self, values: list[float]) -> StepNumbers:
        names = self.dataset.source_names
        nats_of, counts_of, (size, norm) = values[: len(names)], values[len(names) : -2], values[-2:]
        return StepNumbers(
            loss=sum(nats_of) / sum(counts_of),
            loss_by_source={
                name: nats / count for name, nats, count in zip(names, nats_of, counts_of, strict=True) if count
            },
            bits_per_byte=sum(nats_of) / math.log(2) / max(1, size),
            gradient_norm=norm,
        )

    def _on_device(self, batches: list[Batch]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Return ids and marks (b, t + 1) and sources (b) of micro-batches on the device; a GPU need not be waited for."""
        rows = np.concatenate([np.column_stack(_columns(batch)) for batch in batches], dtype=np.int64)
        placed = torch.from_numpy(rows)
        if self.device.type == "cuda":
            placed = placed.pin_memory().to(self.device, non_blocking=True)
        parts = torch.split(placed, [len(batch.ids) for batch in batches])
        length = self.dataset.sequence_length
        return [
            (part[:, :length], part[:, length:-1] if part.shape[1] > length + 1 else None, part[:, -1])
            for part in parts
        ]

    def losses(self, ids_bs: Tensor, marks_bs: Tensor | None) -> Tensor:
        """Return the losses (b, t) in nats of the tokens of sequences (b, t + 1); all processes call it equally often."""
        with torch.no_grad():
            losses_bt: Tensor = self._objective(ids_bs, marks_bs)[1]
        return losses_bt

    def update(self, rate: float, computed: Computed) -> None:
        """Apply a step's gradient, clipped, at a learning rate, unless the step is bad; the gradient is gone then."""
        clip = self.recipe.optimizer.clip_norm or math.inf
        apply_gradient(self.optimizers, rate, computed.is_good, computed.norm, clip)


def _columns(batch: Batch) -> tuple[NDArray[np.int64], ...]:
    return (batch.ids, batch.sources) if batch.marks is None else (batch.ids, batch.marks, batch.sources)


def _learned_in(ids_bs: Tensor, marks_bs: Tensor | None) -> Tensor:
    """Return how many tokens of each sequence are learned from (b), in float64."""
    if marks_bs is None:
        return ids_bs.new_full(ids_bs.shape[:1], ids_bs.shape[1] - 1, dtype=torch.float64)
    return (marks_bs[:, 1:] % 2).sum(1).double()
