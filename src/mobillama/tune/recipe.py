"""The recipe of a tuning run. The text under each field is its ``--help``, as in :mod:`mobillama.recipe`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from mobillama.errors import UsageError
from mobillama.recipe import FaultConfig, OptimizerConfig, TrainConfig, require


@dataclass(frozen=True)
class ChatSourceConfig:
    """One source of conversations."""

    path: str
    """A .jsonl file (also .gz .xz .zst), a .json file that holds one list, or a data set's name (owner/name) or local
    directory. Each row has messages (role, content: OpenAI's form) or conversations (from, value: ShareGPT's)."""
    subset: str = ""
    """Of a data set: the configuration's name."""
    split: str = "train"
    """Of a data set: the split."""
    revision: str = ""
    """Of a data set: the commit to read; empty: the newest, which is recorded."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685, through peft) instead of all weights."""

    rank: int = 0
    """Rank of an adapter; 0: all weights are trained. What layers share has one adapter for all its uses."""
    alpha: int = 32
    """An adapter's output is multiplied by alpha/rank."""
    targets: Literal["all", "attention", "ffn"] = "all"
    """Matrices with an adapter: all of the layers, those of attention, or those of the feed-forward networks."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        require(self.alpha >= 1, "lora.alpha", self.alpha, "1 or more")


@dataclass(frozen=True)
class SftOptimizerConfig(OptimizerConfig):
    """The optimizer of a tuning run; the defaults are AmberChat's, the nearest recipe that was published."""

    learning_rate: float = 2e-5
    """Peak learning rate; adapters take about ten times as much."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up; 0: as many as warmup_share says."""
    warmup_share: float = 0.04
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.warmup_share < 1, "optimizer.warmup_share", self.warmup_share, "at least 0 and below 1")


@dataclass(frozen=True)
class SftTrainConfig(TrainConfig):
    """Length, batch and cadence of a tuning run."""

    steps: int = 0
    """Optimizer steps; 0: as many as epochs take."""
    epochs: float = 3.0
    """How often every sequence is learned from, where steps is 0."""
    batch_size: int = 64
    """Packed sequences in a step, over all devices."""
    micro_batch_size: int = 4
    """Packed sequences that a device takes through the model at once; the rest of the batch is accumulated."""
    mask_documents: bool = True
    """Let no token see another conversation of its sequence, and count positions anew in each."""
    checkpoint_every: int = 500
    """Distance of checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    validate_every: int = 100
    """Steps between validations on held-out conversations; the last step always validates. 0: never."""

    _least_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "above 0")


@dataclass(frozen=True)
class SftRecipe:
    """A supervised fine-tuning run on conversations (``mobillama sft``)."""

    init_from: str
    """The model to start from: a model directory, for example of a run's checkpoint (RUN/checkpoints/step-N/model) or
    one that mobillama import made."""
    sources: dict[str, ChatSourceConfig]
    """The sources of conversations by name, each packed on its own: {name: {path: …}}."""
    run: str
    """Run directory, for example runs/chat."""
    template: str = ""
    """A chat template to train with (a .jinja file); empty: the one that comes with the model, else MobiLlama's own. It
    travels with the tokenizer into every checkpoint and export."""
    context: int = 0
    """Tokens of a packed sequence; 0: the model's context length."""
    holdout: float = 0.02
    """Share of the conversations that are held out for validation; which ones is decided by their content alone."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Rows that are no conversation: stop with an error that names file and line, or skip them (counted)."""
    seed: int = 0
    """Seed of the data order and of the adapters' first weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of all weights."""
    optimizer: SftOptimizerConfig = field(default_factory=SftOptimizerConfig)
    """The optimizer and its schedule."""
    train: SftTrainConfig = field(default_factory=SftTrainConfig)
    """Length, batch and cadence."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """What is done about bad steps."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("sources: none given; name at least one source of conversations")
        for name, source in self.sources.items():
            plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
            require(bool(plain), "sources", repr(name), "a name of letters, digits, '-' and '_'")
            require(bool(source.path), f"sources.{name}.path", repr(source.path), "the name of a file or data set")
        require(self.context == 0 or self.context >= 8, "context", self.context, "0, or 8 or more")
        require(0 <= self.holdout < 1, "holdout", self.holdout, "a share: at least 0 and below 1")
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "within 0…2^63-1")
        for name in ("fused", "float8"):  # they know the plain matrices only
            require(not (self.lora.rank and getattr(self.train, name)), f"train.{name}", True, "false with lora.rank")

    def settled(self, sequences: int) -> SftRecipe:
        """Return the recipe with its steps and warm-up in numbers, for so many training sequences."""
        train, optimizer = self.train, self.optimizer
        steps = train.steps or max(1, math.ceil(train.epochs * sequences / train.batch_size))
        warmup = optimizer.warmup_steps or round(optimizer.warmup_share * steps)
        return replace(self, train=replace(train, steps=steps), optimizer=replace(optimizer, warmup_steps=warmup))
