"""One optimizer step: the batch through the model, its gradient, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mobillama.data.dataset import Dataset, partition
from mobillama.model.loss import linear_cross_entropy
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PretrainRecipe
from mobillama.train.device import autocast_to, choose_device, choose_precision, keep_freed_memory
from mobillama.train.optimizer import build_optimizers, learning_rate
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
        decoder = self.model.model
        self._decoder: Callable[..., torch.Tensor] = torch.compile(decoder) if recipe.train.compile else decoder

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
                hidden_btc = self._decoder(inputs, document_ids=document_ids(inputs, self.eos_id))
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
