"""Looking into runs and data: what a step learns from."""

from __future__ import annotations

import json
from pathlib import Path

from mobillama.config import load_recipe
from mobillama.data.dataset import Dataset
from mobillama.data.tokenizer import decode
from mobillama.errors import UsageError
from mobillama.recipe import PretrainRecipe
from mobillama.record.files import read_json


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


def show_step(path: Path, step: int, batch_size: int | None, seed: int | None, characters: int, as_json: bool) -> None:
    """Print the sequences of a step (counted from 1): row, source, documents and text.

    Raises:
        UsageError: there is no such step, or a data directory is given without a batch size.
    """
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
