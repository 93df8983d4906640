"""One optimizer step: the batch through the model, its gradient, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mobillama.data.dataset import Batch, Dataset
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PretrainRecipe
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
        recipe: the run.
        dataset: what it learns from.
        world: the processes that share a step; their number divides the batch.
        on_note: told what a person should read.

    Raises:
        UsageError: the device lacks what the recipe asks for.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        dataset: Dataset,
        world: World,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        train = recipe.train
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

        self.model = MobiLlama(recipe.model)
        initialise(self.model, recipe.model, recipe.seed)
        self.model.to(self.device)
        if train.fused:
            require_hopper(self.device, self.precision, recipe.model, dataset.sequence_length - 1, train.float8)
        else:
            if train.float8:
                use_float8(self.model)
            checkpoint_activations(self.model.model, train.activation_checkpointing)
        if train.compile:
            compile_layers(self.model.model)
        if train.fused:
            fuse_layers(self.model.model, train.float8, recompute=train.activation_checkpointing == "full")
        eos_id = dataset.tokenizer.eos_id if train.mask_documents else None
        objective = Objective(self.model, train.z_loss, eos_id, autocast_to(self.precision, self.device))
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
        sequences, size = torch.zeros_like(nats), 0
        batches = self.loader.take(step)
        placed = self._on_device(batches)
        for number, (ids, sources) in enumerate(placed, start=1):
            keep_gradients_local(self._objective, number < len(placed))
            total, losses_bt = self._objective(ids)
            if number == 1:
                # A reader takes Python's lock from the thread that gives a GPU its work: not while the GPU has none.
                self.loader.read_ahead(step + 1)
            # Processes' gradients are averaged, and the loss is the mean over all of them.
            torch.autograd.backward(total * self.world.size / self.tokens)
            nats.index_add_(0, sources, losses_bt.double().sum(1))
            sequences.index_add_(0, sources, torch.ones_like(sources, dtype=torch.float64))
            size += int(self.dataset.token_lengths[batches[number - 1].ids[:, 1:]].sum())
        norm = gradient_norm(self.model)
        sums = self.world.sum(torch.cat([nats, sequences, torch.full_like(nats[:1], size)]))
        is_good = sums[: len(nats)].sum().isfinite() & norm.isfinite() & (norm <= limit)
        return Computed(is_good, norm, read_later(torch.cat([sums, norm[None]])), self._numbers)

    def _numbers(self, values: list[float]) -> StepNumbers:
        names, context = self.dataset.source_names, self.dataset.sequence_length - 1
        nats_of, sequences_of, (size, norm) = values[: len(names)], values[len(names) : -2], values[-2:]
        return StepNumbers(
            loss=sum(nats_of) / self.tokens,
            loss_by_source={
                name: nats / (count * context)
                for name, nats, count in zip(names, nats_of, sequences_of, strict=True)
                if count
            },
            bits_per_byte=sum(nats_of) / math.log(2) / max(1, size),
            gradient_norm=norm,
        )

    def _on_device(self, batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
        """Return ids (b, t + 1) and sources (b) of micro-batches on the device; a GPU need not be waited for."""
        rows = np.concatenate([np.column_stack((batch.ids, batch.sources)) for batch in batches], dtype=np.int64)
        placed = torch.from_numpy(rows)
        if self.device.type == "cuda":
            placed = placed.pin_memory().to(self.device, non_blocking=True)
        parts = torch.split(placed, [len(batch.ids) for batch in batches])
        return [(part[:, :-1], part[:, -1]) for part in parts]

    def losses(self, ids_bs: Tensor) -> Tensor:
        """Return the losses (b, t) in nats of the tokens of sequences (b, t + 1); all processes call it equally often."""
        with torch.no_grad():
            losses_bt: Tensor = self._objective(ids_bs)[1]
        return losses_bt

    def update(self, rate: float, computed: Computed) -> None:
        """Apply a step's gradient, clipped, at a learning rate, unless the step is bad; the gradient is gone then."""
        clip = self.recipe.optimizer.clip_norm or math.inf
        apply_gradient(self.optimizers, rate, computed.is_good, computed.norm, clip)
