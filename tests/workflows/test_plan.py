from __future__ import annotations

from pathlib import Path

import pytest

from conftest import run_cli
from mobillama.config import load_recipe
from mobillama.errors import UsageError
from mobillama.recipe import PRESETS, PretrainRecipe
from mobillama.workflows.plan import plan

PAPER = Path(__file__).parents[2] / "recipes" / "paper"


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_are_the_papers(path):
    recipe = load_recipe(PretrainRecipe, path, [])
    tokens = recipe.train.steps * recipe.train.batch_size * 2048
    assert tokens == pytest.approx(120e9 if "120b" in path.stem else 1.2e12, rel=1e-5)
    at = recipe.optimizer
    assert (at.beta1, at.beta2, at.weight_decay, at.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (at.learning_rate, at.min_learning_rate, at.warmup_steps, at.kind, at.schedule) == (
        3e-4,
        3e-5,
        2000,
        "adamw",
        "cosine",
    )
    assert recipe.train.batch_size == 160 * recipe.train.micro_batch_size == 800
    assert recipe.model in [config for config, _ in PRESETS.values()]
    assert not (
        recipe.train.z_loss or recipe.train.mask_documents or recipe.model.qk_norm or recipe.model.scale_residual_init
    )


def test_a_plan_says_what_the_papers_run_takes():
    recipe = load_recipe(PretrainRecipe, PAPER / "mobillama-0.5b.yaml", [])
    facts = plan(recipe, 160, "A100", 8)
    assert facts["checkpoints"] == 344
    assert facts["state_gib"] == pytest.approx(16 * 534_865_920 / 2**30)
    assert facts["micro_batches"] == 1
    assert facts["disk_gb"] == pytest.approx(344 * 12 * 534_865_920 / 1e9)
    flops = 1.2e12 * (6 * (22 * (4 * 2048**2 + 3 * 2048 * 5632) + 32000 * 2048) + 6 * 22 * 2 * 2048 * 1024)
    assert facts["hours"] == pytest.approx(flops / (160 * 312e12 * facts["mfu_assumed"]) / 3600, rel=1e-5)
    assert facts["epochs"] == pytest.approx(732_422 * 800 / (360 * 1_706_976))


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("mobillama-0.5b", 2 * 32000 * 2048 + 3 * 2048 * 5632 + 2048),  # the shared network is the root's
        ("large-base", 2 * 32000 * 2048 + 2048),
    ],
)
def test_a_share_of_a_model_comes_with_what_is_gathered_of_the_whole(name, root):
    recipe = load_recipe(PretrainRecipe, PAPER / f"{name}.yaml", ["--train.parallelism", "hsdp"])
    whole = {"mobillama-0.5b": 534_865_920, "large-base": 1_261_529_088}[name]
    layer = (whole - root) / 22
    assert plan(recipe, 160, "A100", 8)["state_gib"] == pytest.approx((2 * whole + 8 * (root + 2 * layer)) / 2**30)


def test_a_plans_memory_is_near_what_was_measured():
    """One H100, micro-batch 16, compiled, by benchmarks/train.py."""
    for mode, measured in (("none", 47.1), ("selective", 39.6)):
        options = ["--train.micro_batch_size", "16", "--train.activation_checkpointing", mode]
        facts = plan(load_recipe(PretrainRecipe, PAPER / "mobillama-0.5b.yaml", options), 1, "H100", 8)
        assert facts["state_gib"] + facts["activations_gib"] == pytest.approx(measured, rel=0.1)


def test_a_dry_run_writes_nothing_and_refuses_what_cannot_be(recipe_file, tmp_path):
    done = run_cli("pretrain", recipe_file, "--dry-run", "--gpus", "2", "--gpu", "A100")
    assert done.returncode == 0, done.stderr
    assert "3 written, 3 on disk" in done.stdout
    assert not (tmp_path / "run").exists()
    recipe = load_recipe(PretrainRecipe, recipe_file, [])
    with pytest.raises(UsageError, match="'Abacus' is not known; use one of H100"):
        plan(recipe, 1, "Abacus", 8)
    with pytest.raises(UsageError, match="3 devices cannot share"):
        plan(recipe, 3, "H100", 8)
    with pytest.raises(UsageError, match="--gpus: 0 is not a positive number"):
        plan(recipe, 0, "H100", 8)
    with pytest.raises(UsageError, match="--gpus-per-node: 0 is not"):
        plan(recipe, 1, "H100", 0)
