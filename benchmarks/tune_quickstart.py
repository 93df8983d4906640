"""How the quickstart recipe was chosen: variants of it by held-out bits per byte, some seeds each.

    python benchmarks/tune_quickstart.py [--seeds 3] [--device auto] [NAME …]

Each variant is the shipped recipe with dotted overrides. Rows are added to docs/experiments/quickstart.json as they finish,
and docs/experiments/quickstart.md is written from it; a name that is already there is not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from mobillama.config import load_recipe
from mobillama.console import TrainingView, note, progress
from mobillama.data.dataset import Dataset
from mobillama.evaluate.heldout import evaluate_heldout
from mobillama.model.cost import model_cost
from mobillama.recipe import PretrainRecipe
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json, write_text
from mobillama.train.device import choose_device, describe_device
from mobillama.train.loop import pretrain
from mobillama.workflows import quickstart

# name: (what is asked, overrides of the shipped recipe)
# Steps are estimated to take two CPU cores about as long as the shipped recipe does.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "shipped": ("the recipe as it ships", {}),
    "rate-2e-3": ("a lower learning rate", {"optimizer.learning_rate": 2e-3}),
    "rate-4e-3": ("a higher learning rate", {"optimizer.learning_rate": 4e-3}),
    "rate-6e-3": ("twice the learning rate", {"optimizer.learning_rate": 6e-3}),
    "beta2-0.99": ("a longer memory of squared gradients", {"optimizer.beta2": 0.99}),
    "no-decay": ("no weight decay", {"optimizer.weight_decay": 0.0}),
    "init-0.05": ("larger initial weights", {"model.initializer_range": 0.05}),
    "plain-init": ("residual outputs not scaled down", {"model.scale_residual_init": False}),
    "layers-3": (
        "three layers, fewer tokens",
        {"model.num_hidden_layers": 3, "model.intermediate_size": 768, "train.steps": 920},
    ),
    "layers-4": (
        "four layers, fewer tokens",
        {"model.num_hidden_layers": 4, "model.intermediate_size": 704, "train.steps": 750},
    ),
    "layers-3-rate": (
        "three layers with half the learning rate",
        {
            "model.num_hidden_layers": 3,
            "model.intermediate_size": 768,
            "train.steps": 920,
            "optimizer.learning_rate": 1.5e-3,
        },
    ),
    "layers-4-rate": (
        "four layers with a third of the learning rate",
        {
            "model.num_hidden_layers": 4,
            "model.intermediate_size": 704,
            "train.steps": 750,
            "optimizer.learning_rate": 1e-3,
        },
    ),
    "width-320": (
        "wider, fewer tokens",
        {"model.hidden_size": 320, "model.num_attention_heads": 5, "train.steps": 880},
    ),
    "vocabulary-2048": ("half the vocabulary", {"model.vocab_size": 2048, "train.steps": 1320}),
    "vocabulary-8192": ("twice the vocabulary", {"model.vocab_size": 8192, "train.steps": 825}),
    "batch-8": (
        "half the batch, twice the steps",
        {"train.batch_size": 8, "train.micro_batch_size": 8, "train.steps": 2100},
    ),
    "batch-32": (
        "twice the batch, half the steps",
        {"train.batch_size": 32, "train.micro_batch_size": 16, "train.steps": 550},
    ),
    "unshared": ("a feed-forward network for each layer (more parameters)", {"model.share": "none"}),
    "shared-block": ("one whole block for both layers (fewer parameters)", {"model.share": "block"}),
}


def run_variant(overrides: dict[str, object], seed: int, device: str, folder: Path) -> dict[str, Any]:
    """Train the shipped recipe with overrides in ``folder``; return sizes and held-out bits per byte."""
    settings = {**overrides, "seed": seed, "train.device": device, "train.precision": "bfloat16"}
    settings |= {"train.validate_every": 0, "data": folder / "data", "run": folder / "run"}
    words = [f"--{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(PretrainRecipe, Path(quickstart.__file__).with_suffix(".yaml"), words)
    with progress() as show:
        quickstart.make_data(folder, folder / "data", recipe, show)
        started = time.perf_counter()
        checkpoint = pretrain(recipe, TrainingView(show, "pretrain"))
        seconds = time.perf_counter() - started
    held_out = evaluate_heldout(checkpoint / "model", Dataset(folder / "data"), device)
    return {
        "stored_parameters": model_cost(recipe.model).stored_parameters,
        "tokens": recipe.train.steps * recipe.train.batch_size * recipe.model.max_position_embeddings,
        "training_seconds": round(seconds, 1),
        "bits_per_byte": held_out["bits_per_byte"],
    }


def report(found: dict[str, Any]) -> str:
    """Return the experiment's page."""
    lines = [
        "# How the quickstart recipe was chosen",
        "",
        "Variants of the shipped recipe on the sample corpus, with steps estimated to take two CPU cores about as long",
        "as the shipped one. A seed changes the initial weights, the hold-out and the data order. Bits per byte on the whole",
        "hold-out, computed in float32 after training in bfloat16.",
        "",
        "| variant | overrides | stored parameters | tokens | bits per byte, mean | of each seed |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, row in sorted(found.items(), key=lambda item: fmean(item[1]["bits_per_byte"])):
        changes = ", ".join(f"{key} {value}" for key, value in row["overrides"].items()) or "–"
        each = " ".join(f"{value:.4f}" for value in row["bits_per_byte"])
        lines.append(
            f"| **{name}**: {row['question']} | {changes} | {row['stored_parameters']:,} | {row['tokens']:,} | "
            f"{fmean(row['bits_per_byte']):.4f} | {each} |"
        )
    facts = found["shipped"]["environment"] if "shipped" in found else {}
    lines += [
        "",
        f"`python benchmarks/tune_quickstart.py`: trained on {facts.get('device')}, torch "
        f"{facts.get('packages', {}).get('torch')}, {facts.get('date', '')[:10]}, commit {facts.get('commit')}; "
        "each row's own record is in quickstart.json.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the variants named on the command line (default: all)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="variants to run (default: all)")
    out = Path(__file__).parents[1] / "docs" / "experiments" / "quickstart.json"
    parser.add_argument("--out", type=Path, default=out, help="the JSON file to add to (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    args = parser.parse_args()
    found: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    device = describe_device(choose_device(args.device))
    for name in args.names or VARIANTS:
        if name in found:
            continue
        question, overrides = VARIANTS[name]
        rows = []
        for seed in range(args.seeds):
            with TemporaryDirectory() as folder:
                rows.append(run_variant(overrides, seed, args.device, Path(folder)))
        scores = [row["bits_per_byte"] for row in rows]
        facts = {**environment(), "device": device}
        found[name] = {
            "question": question,
            "overrides": overrides,
            **rows[0],
            "bits_per_byte": scores,
            "environment": facts,
        }
        write_json(args.out, found)
        write_text(args.out.with_suffix(".md"), report(found))
        note(f"{name}: {fmean(scores):.4f} bits per byte")


if __name__ == "__main__":
    main()
