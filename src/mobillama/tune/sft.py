"""Supervised fine-tuning: a task of the training loop (:mod:`mobillama.train.task`), of all weights or of adapters."""

from __future__ import annotations

import functools
import hashlib
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.data.template import ChatTemplate
from mobillama.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_digest
from mobillama.directory import WEIGHTS_FILE, load_model, read_config, save_model
from mobillama.engine.weights import check_vocabulary
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama
from mobillama.progress import Show
from mobillama.record.chain import read_chain
from mobillama.record.files import sha256_file
from mobillama.record.manifest import MANIFEST_NAME, read_manifest
from mobillama.train.loop import Reporter, train
from mobillama.train.records import LEDGER_FILE, recorded_steps
from mobillama.train.task import check_shares
from mobillama.train.world import World
from mobillama.tune.adapters import ADAPTER_DIRECTORY, adapter_tensors, add_adapters, merged, save_adapters
from mobillama.tune.conversations import describe_source
from mobillama.tune.dataset import COUNTS, DATA_DIRECTORY, FORMAT, ChatData, Gathered, gather, quiet, write
from mobillama.tune.recipe import SftRecipe

_EXAMPLE = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def sft(recipe: SftRecipe, reporter: Reporter, show: Show = quiet) -> Path:
    """Tune a model on conversations as ``recipe`` says, in :func:`mobillama.train.loop.train`; return the last checkpoint.

    Raises:
        MobiLlamaError: see there, and :class:`Tuning`.
    """
    return train(Tuning(recipe, reporter, show), reporter)


class Tuning:
    """A model that is there already, on conversations that the run directory keeps packed.

    Args:
        recipe: the run.
        reporter: told of the template and of what the sources hold.
        show: told the progress of reading them.
    """

    data: ChatData

    def __init__(self, recipe: SftRecipe, reporter: Reporter, show: Show = quiet) -> None:
        self.recipe, self._reporter, self._show = recipe, reporter, show
        self._start, self._place = Path(recipe.init_from), Path(recipe.run) / DATA_DIRECTORY
        self._gathered: list[Gathered] = []
        self.weights_directory = ADAPTER_DIRECTORY if recipe.lora.rank else "model"

    def check(self, world: World) -> None:
        """Read the conversations, unless the run has them already, and refuse what does not fit.

        Raises:
            UsageError: there is no such model, template or source, a row is no conversation, or they do not fit together.
            CorruptDataError: a source or the model is damaged.
        """
        recipe = self.recipe
        check_shares(recipe, world)
        if recipe.lora.rank and find_spec("peft") is None:  # before any work is done
            raise ModuleNotFoundError("adapters need peft", name="peft")
        if self._start.is_file():
            raise UsageError(
                f"init_from: {self._start} is a file; make a model directory of it: mobillama import {self._start} DIRECTORY"
            )
        shape = read_config(self._start)
        length = (recipe.context or shape.max_position_embeddings) + 1
        if length - 1 > shape.max_position_embeddings:
            raise UsageError(
                f"context: {length - 1} is longer than the {shape.max_position_embeddings} tokens of {self._start}; "
                f"set it to {shape.max_position_embeddings} or less"
            )
        self._tokenizer = load_tokenizer(self._start)
        check_vocabulary(self._start, self._tokenizer.vocab_size, shape.vocab_size)
        template = _template(recipe, self._tokenizer)
        self._tokenizer.chat_template = template.source
        self._tell(template)
        before = read_manifest(self._place, FORMAT) if (self._place / MANIFEST_NAME).is_file() else None
        pinned = _pinned(recipe, before["inputs"]) if before else recipe
        self._inputs = self._describe(pinned, length, template)
        self._is_prepared = before is not None and before["inputs"] == self._inputs
        if self._is_prepared:
            return
        if before is not None and recorded_steps(Path(recipe.run)):
            raise UsageError(
                f"{self._place}: this run learns from other conversations, or another template, than the recipe names; "
                "bring them back, or use another run directory"
            )
        self._gathered = gather(_pinned(recipe, self._inputs), template, length, self._show)

    def prepare(self) -> None:
        """Write the packed conversations into the run directory.

        Raises:
            UsageError: the run started from other weights.
        """
        ledger = Path(self.recipe.run) / LEDGER_FILE
        if recorded_steps(Path(self.recipe.run)) and ledger.is_file():
            started = next(read_chain(ledger), {}).get("init")
            if started != self._init:
                raise UsageError(
                    f"init_from: {self._start} holds other weights than those that {self.recipe.run} started from; bring "
                    "them back, or use another run directory"
                )
        if not self._is_prepared:
            shutil.rmtree(self._place, ignore_errors=True)  # nothing has learned from it
            write(self._place, self._gathered, self._inputs, self._inputs["length"], self._tokenizer, self._show)
            self._gathered = []

    def open(self) -> None:
        """Open the packed conversations; steps and warm-up are numbers now."""
        self.data = ChatData(self._place)
        self.shape = read_config(self._start)
        self.facts = {"init": self._init}
        self.recipe = _pinned(self.recipe, self.data.manifest["inputs"]).settled(self.data.size)
        for source in self.data.manifest["sources"]:
            self._reporter.on_note(_summary(source))

    def build(self) -> MobiLlama:
        """Return the model to start from in float32, with adapters where the recipe asks for them."""
        model = load_model(self._start, dtype=torch.float32)
        if self.recipe.lora.rank:
            add_adapters(model, self.recipe.lora, self.recipe.seed)
        return model

    def stored_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights, or the adapters."""
        weights = model.state_dict()
        return adapter_tensors(weights) if self.recipe.lora.rank else weights

    def save_weights(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write ``model/``, adapters merged into it, and ``adapter/``, where there are any, by themselves."""
        if self.recipe.lora.rank:
            save_adapters(directory / ADAPTER_DIRECTORY, weights, self.recipe.lora, self.recipe.init_from)
            weights = merged(weights, self.recipe.lora)
        save_model(directory / "model", self.shape, weights, self.data.tokenizer)

    @functools.cached_property
    def _init(self) -> str:
        return sha256_file(self._start / WEIGHTS_FILE)

    def _describe(self, recipe: SftRecipe, length: int, template: ChatTemplate) -> dict[str, Any]:
        """Return everything that decides what is learned from."""
        return {
            "length": length,
            "holdout": recipe.holdout,
            "bad_rows": recipe.bad_rows,
            "tokenizer": tokenizer_digest(self._tokenizer),
            "template": hashlib.sha256(template.source.encode()).hexdigest(),
            "sources": [describe_source(source, name) for name, source in recipe.sources.items()],
        }

    def _tell(self, template: ChatTemplate) -> None:
        self._reporter.on_note(
            f"{template.place}:\n{template.source.rstrip()}\nfor example:\n{template.render(_EXAMPLE)}"
        )


def _template(recipe: SftRecipe, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the recipe's chat template, the tokenizer's own, or this project's."""
    if not recipe.template:
        return ChatTemplate.of(tokenizer) or ChatTemplate.default(tokenizer)
    try:
        source = Path(recipe.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"template: {recipe.template} cannot be read as text ({error}); name a .jinja file") from None
    return ChatTemplate(source, tokenizer, recipe.template)


def _pinned(recipe: SftRecipe, inputs: dict[str, Any]) -> SftRecipe:
    """Return a recipe whose data sets have the commits that were found for them, so that each restart reads the same."""
    found = {source["name"]: source.get("revision", "") for source in inputs["sources"]}
    sources = {
        name: source if source.revision else replace(source, revision=found.get(name, ""))
        for name, source in recipe.sources.items()
    }
    return replace(recipe, sources=sources)


def _summary(source: dict[str, Any]) -> str:
    said = [f"{source[key]:,} {key.replace('_', ' ')}" for key in COUNTS if source[key]]
    return (
        f"{source['name']}: {', '.join(said)}; {source['sequences']:,} sequences of {source['tokens']:,} tokens, "
        f"{source['learned_tokens']:,} of them learned"
    )
