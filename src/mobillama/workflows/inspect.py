"""Looking into runs and data: what a step learns from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobillama.config import load_recipe
from mobillama.data.dataset import Dataset
from mobillama.data.tokenizer import Tokenizer, decode
from mobillama.errors import UsageError
from mobillama.recipe import PretrainRecipe
from mobillama.record.files import read_json
from mobillama.record.manifest import MANIFEST_NAME
from mobillama.tune.dataset import DATA_DIRECTORY, ChatData
from mobillama.tune.recipe import SftRecipe


def open_data(path: Path) -> tuple[Dataset, PretrainRecipe | None]:
    """Return the data set of a run directory and the run's recipe, or the data set that ``path`` itself is.

    Raises:
        UsageError: there is neither, or the run's data are no longer those it learned from.
    """
    if not (path / "recipe.yaml").is_file():
        return Dataset(path), None
    recipe = load_recipe(PretrainRecipe, path / "recipe.yaml")
    dataset = Dataset(Path(recipe.data))
    if read_json(path / "data-manifest.json").get("digest") != dataset.digest:
        raise UsageError(f"{dataset.path}: is not the data that {path} learns from; restore that data set")
    return dataset, recipe


def show_conversations(path: Path, step: int, characters: int, as_json: bool) -> None:
    """Print the packed conversations that a step (counted from 1) of a tuning run learns from: what is learned in ⟦ ⟧.

    Raises:
        UsageError: there is no such step.
    """
    data, recipe = ChatData(path / DATA_DIRECTORY), load_recipe(SftRecipe, path / "recipe.yaml")
    if not 1 <= step <= recipe.train.steps:
        raise UsageError(f"--step: {step} is not within the {recipe.train.steps} steps of {path}")
    batch = data.batch(recipe.seed, step - 1, recipe.train.batch_size)
    assert batch.marks is not None
    for ids, marks, row, source in zip(batch.ids, batch.marks, batch.rows, batch.sources, strict=True):
        name = data.source_names[source]
        texts = marked_texts(data.tokenizer, ids, marks)
        if as_json:
            print(
                json.dumps(
                    {"row": int(row), "source": name, "ids": ids.tolist(), "marks": marks.tolist(), "texts": texts}
                )
            )
            continue
        print(f"── sequence {row} · {name} · {len(texts)} conversations")
        for text in texts:
            shown = text if not characters or len(text) <= characters else f"{text[:characters]}…"
            print("   " + shown.replace("\n", "\n   "))


def marked_texts(tokenizer: Tokenizer, ids: NDArray[np.int64], marks: NDArray[np.int64]) -> list[str]:
    """Return the conversations of a sequence as text, what is learned between ⟦ and ⟧, special tokens by their names."""
    names = {token: name for name, token in tokenizer.added_tokens.items()}
    texts = []
    for document in np.unique(marks // 2):
        runs = []
        for is_learned, run in itertools.groupby(
            zip(ids[marks // 2 == document].tolist(), marks[marks // 2 == document].tolist(), strict=True),
            key=lambda pair: pair[1] % 2,
        ):
            table = tokenizer.token_bytes
            pieces = [names[token].encode() if token in names else table[token] for token, _ in run]
            text = b"".join(pieces).decode("utf-8", errors="replace")
            runs.append((is_learned, f"⟦{text}⟧" if is_learned else text))
        if any(is_learned for is_learned, _ in runs):  # what fills a sequence up is no conversation
            texts.append("".join(text for _, text in runs))
    return texts


def show_step(path: Path, step: int, batch_size: int | None, seed: int | None, characters: int, as_json: bool) -> None:
    """Print the sequences of a step (counted from 1): row, source, documents and text.

    Raises:
        UsageError: there is no such step, or a data directory is given without a batch size.
    """
    if (path / DATA_DIRECTORY / MANIFEST_NAME).is_file():
        show_conversations(path, step, characters, as_json)
        return
    dataset, recipe = open_data(path)
    if recipe is not None:
        if step > recipe.train.steps:
            raise UsageError(f"--step: {step} is beyond the {recipe.train.steps} steps of {path}")
        batch_size = batch_size or recipe.train.batch_size
    if seed is None:
        seed = dataset.prepared_seed if recipe is None else recipe.seed
    if batch_size is None or batch_size < 1:
        raise UsageError(f"--batch-size: say how many sequences a step has (or show a run directory instead of {path})")
    if step < 1:
        raise UsageError(f"--step: {step} is below 1; steps are counted from 1")
    batch = dataset.batch(seed, step - 1, batch_size)
    for ids, row, source in zip(batch.ids.tolist(), batch.rows.tolist(), batch.sources.tolist(), strict=True):
        spans = dataset.spans(row)
        name, text = dataset.source_names[source], decode(dataset.tokenizer, ids)
        if as_json:
            documents = [vars(span) for span in spans]
            print(json.dumps({"row": row, "source": name, "documents": documents, "ids": ids, "text": text}))
            continue
        print(f"── sequence {row} · {name}")
        for span in spans:
            print(
                f"   ids {span.start}…{span.end}: document {span.document}, {span.file}:{span.line}, sha256 {span.digest}…"
            )
        shown = text if not characters or len(text) <= characters else f"{text[:characters]}…"
        print("   " + shown.replace("\n", "\n   "))
