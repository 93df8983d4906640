"""One optimizer step: the batch through the model, its gradient, the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mobillama.data.dataset import Dataset, partition
from mobillama.errors import UsageError
from mobillama.model.loss import linear_cross_entropy
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PretrainRecipe
from mobillama.train.device import (
    autocast_to,
    choose_device,
    choose_precision,
    describe_device,
    has_float8,
    keep_freed_memory,
    make_deterministic,
)
from mobillama.train.optimizer import build_optimizers, learning_rate
from mobillama.train.speed import checkpoint_activations, compile_layers, use_float8
from mobillama.train.validation import document_ids


@dataclass(frozen=True)
class StepNumbers:
    """What a step computed: nats per token, over all and by source, and the norm of the gradient before clipping."""

    loss: float
    loss_by_source: dict[str, float]
    gradient_norm: float


class Stepper:
    """The model and its optimizers in one process.

    Args:
        recipe: the run.
        dataset: what it learns from.
    """

    def __init__(self, recipe: PretrainRecipe, dataset: Dataset) -> None:
        self.recipe, self.dataset = recipe, dataset
        self.device = choose_device(recipe.train.device)
        if recipe.train.deterministic:
            make_deterministic()
        if recipe.train.float8 and not has_float8(self.device):
            raise UsageError(f"train.float8: {describe_device(self.device)} multiplies no float8; set it to false")
        self.precision = choose_precision(recipe.train.precision, self.device)
        self.autocast = autocast_to(self.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        model = MobiLlama(recipe.model)
        initialise(model, recipe.model, recipe.seed)
        self.model = model.to(self.device)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.eos_id = dataset.tokenizer.eos_id if recipe.train.mask_documents else None
        self.tokens = recipe.train.batch_size * (dataset.sequence_length - 1)
        if recipe.train.float8:
            use_float8(self.model)
        checkpoint_activations(self.model.model, recipe.train.activation_checkpointing)
        if recipe.train.compile:
            compile_layers(self.model.model)

    def rate(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        return learning_rate(self.recipe.optimizer, step, self.recipe.train.steps)

    def gradient(self, step: int) -> StepNumbers:
        """Compute the gradient of step ``step`` (from 0), clipped; it waits in the parameters."""
        recipe, train = self.recipe, self.recipe.train
        by_source = torch.zeros(len(self.dataset.source_names), dtype=torch.float64, device=self.device)
        sequences = torch.zeros_like(by_source)
        for part in partition(train.batch_size, train.micro_batch_size):
            batch = self.dataset.batch(recipe.seed, step, train.batch_size, part)
            ids = torch.from_numpy(batch.ids).to(self.device)
            sources = torch.from_numpy(batch.sources).to(self.device)
            inputs, targets = ids[:, :-1], ids[:, 1:]
            with self.autocast():
                hidden_btc = self.model.model(inputs, document_ids=document_ids(inputs, self.eos_id))
                head = self.model.lm_head.weight
                total, losses_bt = linear_cross_entropy(hidden_btc, head, targets, train.z_loss)
            torch.autograd.backward(total / self.tokens)
            by_source.index_add_(0, sources, losses_bt.double().sum(1))
            sequences.index_add_(0, sources, torch.ones_like(sources, dtype=torch.float64))
        limit = recipe.optimizer.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        tokens = (sequences * (self.dataset.sequence_length - 1)).tolist()
        means = zip(self.dataset.source_names, by_source.tolist(), tokens, strict=True)
        return StepNumbers(
            loss=float(by_source.sum()) / self.tokens,
            loss_by_source={name: nats / count for name, nats, count in means if count},
            gradient_norm=float(norm),
        )

    def update(self, rate: float) -> None:
        """Apply the gradient at a learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Throw the gradient away."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
