"""How the quickstart recipe was chosen: variants of it, each trained for about the same time, by held-out bits per byte.

    python benchmarks/tune_quickstart.py [NAME …]

Each variant is the shipped recipe with dotted overrides. Rows are added to docs/experiments/quickstart.json as they finish,
and docs/experiments/quickstart.md is written from it; a name that is already there is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mobillama.config import load_recipe
from mobillama.console import TrainingView, note, progress
from mobillama.data.dataset import Dataset
from mobillama.evaluate.heldout import evaluate_heldout
from mobillama.model.cost import model_cost
from mobillama.recipe import PretrainRecipe
from mobillama.record.environment import environment
from mobillama.record.files import write_json, write_text
from mobillama.train.loop import pretrain
from mobillama.workflows import quickstart

# name: (what is asked, overrides of the shipped recipe)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "shipped": ("the recipe as it ships", {}),
    "rate-2e-3": ("a lower learning rate", {"optimizer.learning_rate": 2e-3}),
    "rate-4e-3": ("a higher learning rate", {"optimizer.learning_rate": 4e-3}),
    "init-0.05": ("larger initial weights", {"model.initializer_range": 0.05}),
    "layers-4": (
        "four layers, fewer tokens",
        {"model.num_hidden_layers": 4, "model.intermediate_size": 704, "train.steps": 680},
    ),
    "vocabulary-2048": ("half the vocabulary", {"model.vocab_size": 2048, "train.steps": 1200}),
    "vocabulary-8192": ("twice the vocabulary", {"model.vocab_size": 8192, "train.steps": 750}),
    "batch-8": (
        "half the batch, twice the steps",
        {"train.batch_size": 8, "train.micro_batch_size": 8, "train.steps": 1900},
    ),
}


def run_variant(overrides: dict[str, object], folder: Path) -> dict[str, object]:
    """Train the shipped recipe with overrides in ``folder``; return sizes, time and held-out bits per byte."""
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    words += ["--data", str(folder / "data"), "--run", str(folder / "run"), "--train.validate_every", "0"]
    recipe = load_recipe(PretrainRecipe, Path(quickstart.__file__).with_suffix(".yaml"), words)
    with progress() as show:
        quickstart.make_data(folder, folder / "data", recipe, show)
        started = time.perf_counter()
        checkpoint = pretrain(recipe, TrainingView(show))
        seconds = time.perf_counter() - started
    held_out = evaluate_heldout(checkpoint / "model", Dataset(folder / "data"), "cpu")
    return {
        "overrides": overrides,
        "stored_parameters": model_cost(recipe.model).stored_parameters,
        "tokens": recipe.train.steps * recipe.train.batch_size * recipe.model.max_position_embeddings,
        "training_seconds": round(seconds, 1),
        "bits_per_byte": held_out["bits_per_byte"],
        "bits_per_byte_by_source": held_out["bits_per_byte_by_source"],
    }


def report(found: dict[str, Any]) -> str:
    """Return the experiment's page."""
    lines = [
        "# How the quickstart recipe was chosen",
        "",
        "Variants of the shipped recipe on the sample corpus, one seed each, sized to train for about the same time on two",
        "CPU cores. Bits per byte on the whole hold-out, float32. Differences of about 0.01 are within what another seed",
        "may change; we did not measure that spread. All models share one feed-forward network.",
        "",
        "| variant | overrides | stored parameters | tokens | training seconds | bits per byte |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["bits_per_byte"]):
        changes = ", ".join(f"{key} {value}" for key, value in row["overrides"].items()) or "–"
        lines.append(
            f"| {name}: {row['question']} | {changes} | {row['stored_parameters']:,} | {row['tokens']:,} | "
            f"{row['training_seconds']:.0f} | {row['bits_per_byte']:.4f} |"
        )
    lines += [
        "",
        "`python benchmarks/tune_quickstart.py`; date, machine and commit of each row are in quickstart.json. The machine",
        "also did other work at times, so the seconds are upper bounds.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the variants named on the command line (default: all)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="variants to run (default: all)")
    out = Path(__file__).parents[1] / "docs" / "experiments" / "quickstart.json"
    parser.add_argument("--out", type=Path, default=out, help="the JSON file to add to (default: %(default)s)")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    for name in args.names or VARIANTS:
        if name in found["rows"]:
            continue
        question, overrides = VARIANTS[name]
        with TemporaryDirectory() as folder:
            row = run_variant(overrides, Path(folder))
        found["rows"][name] = {"question": question, **row, "environment": environment()}
        write_json(args.out, found)
        write_text(args.out.with_suffix(".md"), report(found))
        note(f"{name}: {row['bits_per_byte']:.4f} bits per byte in {row['training_seconds']} s")


if __name__ == "__main__":
    main()
