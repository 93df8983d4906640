"""All checkpoints of a run, and what the command line says to wrong use."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from conftest import run_cli
from mobillama.cli import main
from mobillama.evaluate.results import read_result


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "MOBILLAMA_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}


def test_every_checkpoint_of_a_run_and_a_damaged_one(recipe_file, benchmarks, tmp_path, environment):
    run = tmp_path / "run"
    assert run_cli("pretrain", recipe_file).returncode == 0
    words = ["evaluate", run, "--suite", "perplexity", "--benchmarks", benchmarks, "--all-checkpoints", "--json"]
    done = run_cli(*words, "--follow", env=environment)  # the run has ended: follow leaves at once
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(r["model"]["step"], r["model"]["tokens"]) for r in results] == [(s, s * 8 * 64) for s in (4, 8, 12)]
    bits = [r["holdout"]["bits_per_byte"] for r in results]
    assert bits[0] > bits[-1]
    assert all(r["benchmarks"]["WikiText-2"]["stderr"] > 0 for r in results)
    assert (run / "evals" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "evals" / "perplexity" / "step-000012" / "samples.jsonl").is_file()

    weights = run / "checkpoints" / "step-000008" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (run / "evals" / "perplexity" / "step-000008" / "result.json").unlink()
    again = run_cli(*words, env=environment)
    assert again.returncode == 4 and "sha256 differs from its manifest" in again.stderr
    found = json.loads(again.stdout)["results"]
    assert [r["status"] for r in found] == ["done", "failed", "done"]
    assert [found[0], found[2]] == [results[0], results[2]]  # what is done is not done again
    people = run_cli(
        "evaluate", run, "--suite", "perplexity", "--benchmarks", benchmarks, "--all-checkpoints", env=environment
    )
    assert "WikiText-2" in people.stdout and "failed" in people.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "papr"], "did you mean 'paper'"),
        (["--suite", "paper", "--benchmarks", "absent"], "absent: no such directory"),
        (["--suite", "paper", "--data", "d"], "--data: is read by --suite perplexity alone"),
        (["--suite", "quick", "--follow"], "--follow: goes with --all-checkpoints"),
        (["--suite", "perplexity", "--baselines"], "--baselines: are computed on a hold-out"),
        (["--suite", "quick", "--all-checkpoints"], "no recipe.yaml there"),
    ],
)
def test_wrong_use_exits_2(small_model, words, said, capsys):
    assert main(["evaluate", str(small_model), *words]) == 2
    assert said in capsys.readouterr().err


def test_models_that_are_not_there_exit_2(small_model, benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOBILLAMA_CACHE", str(tmp_path / "cache"))
    words = ["--suite", "perplexity", "--benchmarks", str(benchmarks)]
    for name, said in ((tmp_path / "no", "no such directory"), (benchmarks, "no config.json")):
        assert main(["evaluate", str(name), *words]) == 2
        assert said in capsys.readouterr().err


def test_revisions_of_a_repository_as_the_hub_caches_it(small_model, benchmarks, tmp_path, environment):
    cached = tmp_path / "hub" / "models--org--small"
    for revision, commit in (("ckpt_100", "a" * 40), ("ckpt_20", "b" * 40)):
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
        shutil.copytree(small_model, cached / "snapshots" / commit)
    words = ["evaluate", "org/small", "--suite", "perplexity", "--benchmarks", benchmarks, "--out", tmp_path / "evals"]
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub")}
    done = run_cli(*words, "--revisions", "ckpt_100", "ckpt_20", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(r["model"]["name"], r["model"]["number"]) for r in results] == [
        ("org/small@ckpt_100", 100),
        ("org/small@ckpt_20", 20),
    ]
    assert (tmp_path / "evals" / "perplexity" / "org-small.png").is_file()
    missing = run_cli(*words, "--revisions", "ckpt_7", env=environment)
    assert missing.returncode == 2 and "org/small at ckpt_7: neither a directory here nor" in missing.stderr


def test_another_limit_or_precision_is_another_directory(small_model, benchmarks, tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILLAMA_CACHE", str(tmp_path / "cache"))
    words = ["evaluate", str(small_model), "--suite", "perplexity", "--benchmarks", str(benchmarks)]
    words += ["--out", str(tmp_path), "--device", "cpu"]
    for more in ([], ["--limit", "2"], ["--limit", "2", "--precision", "float32"]):
        assert main([*words, *more]) == 0
    whole, limited, precise = sorted((tmp_path / "perplexity").iterdir())
    assert limited.name == f"{whole.name}-limit-2" and precise.name == f"{whole.name}-limit-2-float32"
    counts = [read_result(place)["benchmarks"]["LAMBADA"]["questions"] for place in (whole, limited)]
    assert counts[0] > counts[1] == 2
