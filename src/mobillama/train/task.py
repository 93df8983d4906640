"""What a run trains: the seam between the loop and the kinds of training that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mobillama.data.dataset import Batch, Dataset
from mobillama.data.tokenizer import Tokenizer
from mobillama.directory import save_model
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import FaultConfig, ModelConfig, OptimizerConfig, PretrainRecipe, TrainConfig
from mobillama.train.world import World


class Recipe(Protocol):
    """The sections of a recipe that the loop reads; all of a recipe is what its run is known by."""

    @property
    def run(self) -> str:
        """The run directory."""

    @property
    def seed(self) -> int:
        """Seed of the data order."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer and its schedule."""

    @property
    def train(self) -> TrainConfig:
        """Length, batch and cadence."""

    @property
    def faults(self) -> FaultConfig:
        """What is done about bad steps."""


class Data(Protocol):
    """Sequences whose batches are a pure function of (data, seed, step): a prepared data set, or packed conversations."""

    path: Path
    manifest: dict[str, Any]
    digest: str
    """Of the manifest."""
    root: bytes
    """Merkle root of the training sequences."""
    sequence_length: int
    source_names: list[str]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""

    @property
    def token_lengths(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for."""

    @property
    def chunk_ends(self) -> list[int]:
        """The number of training sequences in the first chunk, in the first two, and so on."""

    @property
    def holdout_sizes(self) -> dict[str, int]:
        """The number of held-out sequences of each source."""

    def batch(self, seed: int, step: int, batch_size: int, part: slice = ...) -> Batch:
        """Return the sequences of a step (from 0), or a part of them."""

    def learned_tokens(self, seed: int, step: int, batch_size: int) -> int:
        """Return how many tokens a step learns from, over all processes."""

    def holdout_batch(self, source: str, limit: int, start: int) -> Batch:
        """Return at most ``limit`` held-out sequences of a source from ``start`` on."""


class Task(Protocol):
    """A kind of training. The first process checks it and prepares it, then every process opens it."""

    @property
    def recipe(self) -> Recipe:
        """The run; complete once the task is open."""

    @property
    def shape(self) -> ModelConfig:
        """The model's shape."""

    @property
    def data(self) -> Data:
        """What is learned from."""

    @property
    def facts(self) -> dict[str, str]:
        """What the ledger's first line names beside recipe and data."""

    @property
    def weights_directory(self) -> str:
        """Where in a checkpoint the weights stand that a resume reads."""

    def check(self, world: World) -> None:
        """Refuse what cannot be, before anything is written."""

    def prepare(self) -> None:
        """Write into the run directory, which is this process's now, what the run needs."""

    def open(self) -> None:
        """Read what was prepared."""

    def build(self) -> MobiLlama:
        """Return the model with its first weights; those that require gradients are trained."""

    def stored_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that a resume reads, by their names in ``weights_directory``."""

    def save_weights(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write a checkpoint's ``model/``, and ``weights_directory``, from a copy of the model's state dict."""


class Pretraining:
    """A model of a recipe's shape, drawn anew, on a prepared data set; it is open if ``data`` are given."""

    data: Data
    weights_directory = "model"

    def __init__(self, recipe: PretrainRecipe, data: Data | None = None) -> None:
        self.recipe, self.shape, self._data_path = recipe, recipe.model, Path(recipe.data)
        self.facts: dict[str, str] = {}
        if data is not None:
            self.data = data

    def check(self, world: World) -> None:
        """Refuse data that are not all there, a model that cannot learn them, and a batch that cannot be shared.

        Raises:
            UsageError: recipe and data do not fit.
            CorruptDataError: a file is missing, has another size, or belongs to a damaged tokenizer.
        """
        dataset = Dataset(self._data_path)
        dataset.check_sizes()
        check_shares(self.recipe, world)
        ids = dataset.tokenizer.vocab_size
        if self.shape.vocab_size != ids:
            raise UsageError(
                f"model.vocab_size: {self.shape.vocab_size}, but the tokenizer of {dataset.path} has {ids} ids; "
                f"set model.vocab_size to {ids}"
            )
        context = dataset.sequence_length - 1
        if self.shape.max_position_embeddings < context:
            raise UsageError(
                f"model.max_position_embeddings: {self.shape.max_position_embeddings} is shorter than the {context} "
                f"tokens that {dataset.path} holds in a sequence; set it to {context} or more"
            )

    def prepare(self) -> None:
        """Write nothing: the data set stands elsewhere."""

    def open(self) -> None:
        """Open the data set."""
        self.data = Dataset(self._data_path)

    def build(self) -> MobiLlama:
        """Return the model, drawn from the recipe's seed."""
        model = MobiLlama(self.shape)
        initialise(model, self.shape, self.recipe.seed)
        return model

    def stored_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights."""
        return model.state_dict()

    def save_weights(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write ``model/``."""
        save_model(directory / "model", self.shape, weights, self.data.tokenizer)


def check_shares(recipe: Recipe, world: World) -> None:
    """Refuse a batch that the processes cannot share.

    Raises:
        UsageError: their number does not divide it.
    """
    if recipe.train.batch_size % world.size:
        raise UsageError(
            f"train.batch_size: {world.size} processes cannot share {recipe.train.batch_size} sequences equally; "
            "start a number of processes that divides it"
        )
