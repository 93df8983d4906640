"""Verbs that train: quickstart, presets, pretrain, sft."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobillama.cli.verbs import add_verb

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs


def add_first(verbs: Verbs) -> None:
    """Add what a newcomer tries first."""
    verb = add_verb(verbs, "quickstart", _quickstart, "train, evaluate, export and sample a small model, offline")
    verb.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="run directory (default: %(default)s)")
    verb.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")

    verb = add_verb(verbs, "presets", _presets, "list the model shapes with parameters, arithmetic and memory")
    verb.add_argument("--json", action="store_true", help="print JSON")


def add(verbs: Verbs) -> None:
    """Add training."""
    verb = add_verb(verbs, "pretrain", _pretrain, "pre-train a model; the same command resumes a run", _pretrain_recipe)
    verb.add_argument("recipe", type=Path, help="a pre-training recipe (YAML)")
    verb.add_argument("--print-config", action="store_true", help="print the resolved recipe and leave")
    verb.add_argument("--dry-run", action="store_true", help="print memory, steps, checkpoints, disk, hours, and leave")
    verb.add_argument("--gpus", type=int, default=1, help="for --dry-run: number of GPUs (default: %(default)s)")
    verb.add_argument("--gpu", default="H100", help="for --dry-run: kind of GPU (default: %(default)s)")
    verb.add_argument("--gpus-per-node", type=int, default=8, help="for --dry-run: GPUs of a machine (default: 8)")

    verb = add_verb(
        verbs, "sft", _sft, "fine-tune a model on conversations; the same command resumes a run", _sft_recipe
    )
    verb.add_argument("recipe", type=Path, help="a tuning recipe (YAML)")
    verb.add_argument("--print-config", action="store_true", help="print the resolved recipe and leave")


def _pretrain_recipe() -> type[Any]:
    from mobillama.recipe import PretrainRecipe

    return PretrainRecipe


def _sft_recipe() -> type[Any]:
    from mobillama.tune.recipe import SftRecipe

    return SftRecipe


def _quickstart(args: argparse.Namespace) -> None:
    from mobillama.workflows.quickstart import quickstart

    quickstart(args.run, args.steps)


def _presets(args: argparse.Namespace) -> None:
    from mobillama.workflows.presets import preset_rows, show_presets

    if args.json:
        print(json.dumps(preset_rows(), indent=2))
    else:
        show_presets()


def _pretrain(args: argparse.Namespace) -> None:
    from mobillama.config import load_recipe, to_yaml
    from mobillama.recipe import PretrainRecipe

    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides)
    if args.print_config:
        print(to_yaml(recipe), end="")
        return
    if args.dry_run:
        from mobillama.workflows.plan import show_plan

        show_plan(recipe, args.gpus, args.gpu, args.gpus_per_node)
        return
    from mobillama.console import TrainingView, progress
    from mobillama.train.loop import Silent, pretrain

    if _is_silent():
        pretrain(recipe, Silent())
        return
    with progress() as show:
        path = pretrain(recipe, TrainingView(show, "pretrain"))
    print(path / "model")


def _sft(args: argparse.Namespace) -> None:
    from mobillama.config import load_recipe, to_yaml
    from mobillama.tune.recipe import SftRecipe

    recipe = load_recipe(SftRecipe, args.recipe, args.overrides)
    if args.print_config:
        print(to_yaml(recipe), end="")
        return
    from mobillama.console import TrainingView, progress
    from mobillama.train.loop import Silent
    from mobillama.tune.sft import sft

    if _is_silent():
        sft(recipe, Silent())
        return
    with progress() as show:
        path = sft(recipe, TrainingView(show, "sft"), show)
    print(path / "model")


def _is_silent() -> bool:
    """Tell whether another of torchrun's processes, the first one, speaks for all."""
    return bool(int(os.environ.get("RANK", "0")))
