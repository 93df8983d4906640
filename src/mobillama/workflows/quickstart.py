"""The whole journey in minutes, offline: text → tokenizer → sequences → model → evaluation → export → words."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mobillama.config import load_recipe
from mobillama.console import TrainingView, note, progress, table
from mobillama.data.dataset import Dataset
from mobillama.data.documents import read_texts
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.deploy.hf import export_hf
from mobillama.engine.load import load_engine
from mobillama.engine.sampling import Sampling
from mobillama.engine.stream import Session, stream_tokens, text_of
from mobillama.errors import UsageError
from mobillama.evaluate.heldout import evaluate_baselines, evaluate_heldout
from mobillama.model.cost import model_cost
from mobillama.recipe import PrepareRecipe, PretrainRecipe, SourceConfig
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.report.picture import draw_loss
from mobillama.train.loop import pretrain

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
SOURCES = ("books", "encyclopedia", "code", "speeches", "manuals")
PROMPTS = ("It is a truth universally acknowledged, that", "The country lies", "def read(self, path):")


def quickstart(run: Path, steps: int | None = None) -> dict[str, Any]:
    """Run the journey in ``run`` and print its table; run again, it goes on where it stopped.

    Args:
        run: run directory.
        steps: optimizer steps instead of the recipe's.

    Returns:
        What is also written to ``quickstart.json``.
    """
    started = time.perf_counter()
    if run.exists() and any(run.iterdir()) and not (run / "tokenizer.model").exists():
        raise UsageError(f"{run}: is not empty and no quickstart; choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    data, written = run / "data", run / "quickstart.json"
    overrides = ["--data", str(data), "--run", str(run)] + (["--train.steps", str(steps)] if steps is not None else [])
    recipe = load_recipe(PretrainRecipe, Path(__file__).with_suffix(".yaml"), overrides)
    if written.exists() and recipe == load_recipe(PretrainRecipe, run / "recipe.yaml"):
        note(f"{run}: is finished; remove it to start anew")
        _show(run, read_json(written))
        return read_json(written)
    resumed = (run / "checkpoints").exists()
    with progress() as show:
        make_data(run, data, recipe, show)
        checkpoint = pretrain(recipe, TrainingView(show, "pretrain"))
        exports = {}
        for number, (name, unshared) in enumerate((("mobillama", False), ("llama", True)), 1):
            shutil.rmtree(run / "export" / name, ignore_errors=True)
            exports[name] = export_hf(checkpoint / "model", run / "export" / name, unshared)
            show("export and reload", number, 2)
        dataset, deployed = Dataset(data), run / "export" / "mobillama"
        held_out = evaluate_heldout(deployed, dataset, "cpu", 0, lambda done, total: show("evaluate", done, total))
        show("yardsticks and picture", 0, 2)
        yardsticks = evaluate_baselines(dataset)
        show("yardsticks and picture", 1, 2)
        draw_loss(run, run / "loss.png", yardsticks)
        show("yardsticks and picture", 2, 2)
        samples = {}
        for number, prompt in enumerate(PROMPTS, 1):
            samples[prompt] = _continue(deployed, prompt)
            show("write samples", number, len(PROMPTS))
    result = {
        "environment": environment(),
        "command": "mobillama quickstart" + ("" if steps is None else f" --steps {steps}"),
        "resumed": resumed,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _rss_unit()),
        "stored_parameters": model_cost(recipe.model).stored_parameters,
        "applied_parameters": model_cost(recipe.model).applied_parameters,
        "steps": recipe.train.steps,
        "trained_tokens": recipe.train.steps * recipe.train.batch_size * (dataset.sequence_length - 1),
        "held_out": held_out,
        "baselines": yardsticks,
        "exports": exports,
        "samples": samples,
    }
    write_json(written, result)
    _show(run, result)
    return result


def make_data(run: Path, data: Path, recipe: PretrainRecipe, show: Any) -> None:
    """Train the tokenizer in ``run`` and prepare the sample corpus in ``data``, as the recipe's model wants them."""
    files = {name: SAMPLE / f"{name}.jsonl.xz" for name in SOURCES}
    tokenizer = run / "tokenizer.model"
    show("train tokenizer", 0, 1)
    if not tokenizer.exists():
        texts = read_texts(list(files.values()))
        train_tokenizer(texts, recipe.model.vocab_size, tokenizer)
    show("train tokenizer", 1, 1)
    sources = {
        name: SourceConfig(str(path), licence="see PROVENANCE.md of the sample corpus") for name, path in files.items()
    }
    length = recipe.model.max_position_embeddings + 1
    prepare(PrepareRecipe(sources, str(tokenizer), length, holdout=0.05, chunks=8, seed=recipe.seed), data, show)


def _continue(model: Path, prompt: str, tokens: int = 80) -> str:
    engine, tokenizer = load_engine(model)
    (ids,) = tokenizer.encode([prompt])
    drawn = stream_tokens(
        Session(engine), ids, {tokenizer.eos_id}, Sampling(0.7, 0, 0.9), tokens, np.random.default_rng(0)
    )
    return "".join(text_of(drawn, tokenizer))


def _rss_unit() -> int:
    """ru_maxrss counts KiB on Linux and bytes on macOS."""
    return 1 << 20 if sys.platform == "darwin" else 1 << 10


def _show(run: Path, result: dict[str, Any]) -> None:
    for prompt, text in result["samples"].items():
        print(f"» {prompt}{text}\n")
    ours = f"this model ({result['stored_parameters']:,} stored, {result['applied_parameters']:,} applied parameters)"
    ranked = sorted([(ours, result["held_out"]["bits_per_byte"]), *result["baselines"].items()], key=lambda row: row[1])
    title = f"Held out: {result['held_out']['bytes']:,} bytes of {len(SOURCES)} sources"
    table(title, ["", "bits per byte"], [(name, f"{value:.3f}") for name, value in ranked])
    minutes, seconds = divmod(round(result["seconds"]), 60)
    part = " (of the part after the resume)" if result["resumed"] else ""
    note(
        f"{minutes} min {seconds} s{part} · peak memory {result['peak_memory_mib']:,} MiB · {result['trained_tokens']:,} tokens"
    )
    note(f"picture: {run / 'loss.png'} · numbers: {run / 'quickstart.json'}")
    note(f"talk to it: mobillama chat {run / 'export' / 'mobillama'}")
    print(run)
