"""All checkpoints of a run, and what the command line says to wrong use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import run_cli
from mobillama.cli import main
from mobillama.errors import CorruptDataError
from mobillama.evaluate.model import find_model
from mobillama.evaluate.results import read_result
from mobillama.evaluate.suites import SUITES
from mobillama.record.files import sha256_file
from mobillama.record.lock import locked
from mobillama.report import picture
from mobillama.train.checkpoint import list_checkpoints
from mobillama.workflows import evaluation as workflow


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
    (run / "checkpoints" / "step-000010").mkdir()
    again = run_cli(*words, env=environment)
    assert again.returncode == 4 and "sha256 differs from its manifest" in again.stderr
    assert "step 10: no manifest.json, passed over" in again.stderr
    found = json.loads(again.stdout)["results"]
    assert [r["status"] for r in found] == ["done", "failed", "done"]
    assert [found[0], found[2]] == [results[0], results[2]]  # what is done is not done again
    people = run_cli(
        "evaluate", run, "--suite", "perplexity", "--benchmarks", benchmarks, "--all-checkpoints", env=environment
    )
    assert re.search(r"WikiText-2 \(\d+\)", people.stdout) and people.stderr.endswith("mobillama: 1 of 3 failed\n")


@pytest.fixture
def run(recipe_file, tmp_path, monkeypatch):
    """A run with checkpoints of steps 4, 8 and 12, whose hold-out alone is read."""
    monkeypatch.setenv("MOBILLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOBILLAMA_BENCHMARKS", raising=False)
    assert main(["pretrain", str(recipe_file)]) == 0
    return tmp_path / "run"


def sweep(run, *more) -> list[str]:
    return ["evaluate", str(run), "--suite", "perplexity", "--all-checkpoints", "--json", "--device", "cpu", *more]


def steps_of(output: str) -> list[int]:
    return [result["model"]["step"] for result in json.loads(output)["results"]]


def evaluations(run) -> list[Path]:
    return [run / "evals" / "perplexity" / f"step-{step:06d}" for step in (4, 8, 12)]


def test_two_processes_that_share_a_run_evaluate_each_checkpoint_once_and_show_all(run):
    command = [sys.executable, "-m", "mobillama", *sweep(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    shown = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    assert max((steps_of(out) for out, _ in shown), key=len) == [4, 8, 12]
    assert not [place for place in run.glob("evals/perplexity/*/*") if place.name.startswith("earlier")]


def test_what_other_processes_evaluate_is_told_and_what_they_did_is_shown(run, data, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture, "draw_evaluations", lambda done, *_: drawn.append([r["model"]["step"] for r in done]))
    for directory in evaluations(run):
        directory.mkdir(parents=True)
    with ExitStack() as held:
        for directory in evaluations(run):
            held.enter_context(locked(directory, "an evaluation"))
        assert main(sweep(run)) == 2
        assert f"{run}: all 3 are being evaluated elsewhere" in capsys.readouterr().err
    with locked(evaluations(run)[0], "an evaluation"):
        assert main(sweep(run)) == 0
        shown = capsys.readouterr()
        assert steps_of(shown.out) == [8, 12] and "1 of 3 are being evaluated elsewhere" in shown.err
    model = run / "checkpoints" / "step-000004" / "model"
    assert main(["evaluate", str(model), "--suite", "perplexity", "--data", str(data), "--device", "cpu"]) == 0
    capsys.readouterr()
    with locked(evaluations(run)[1], "an evaluation"):  # done, and another process looks at it
        assert main([*sweep(run), "--baselines"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert [result["model"]["step"] for result in shown["results"]] == [4, 8, 12] == drawn[-1]
        assert shown["baselines"]["gzip -9"] > 1


def test_a_run_whose_data_were_moved_is_told_how_to_name_them(run, data, tmp_path, capsys):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(data), str(tmp_path / "moved")))
    assert main(sweep(run)) == 2
    assert (
        f"{tmp_path / 'moved'}: no such directory, where {run} had its data; name them with --data"
        in capsys.readouterr().err
    )
    assert main(sweep(run, "--data", str(tmp_path / "no"))) == 2
    assert f"{tmp_path / 'no'}: no prepared data there" in capsys.readouterr().err
    assert main(sweep(run, "--data", str(data))) == 0


def test_follow_waits_while_a_trainer_runs_and_passes_over_what_is_removed(run, capsys, monkeypatch):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 12", "steps: 16"))
    trainer = ExitStack()
    trainer.enter_context(locked(run, "a trainer"))
    monkeypatch.setattr(workflow.time, "sleep", lambda seconds: trainer.close())
    gone = run / "checkpoints" / "step-000006"
    monkeypatch.setattr(workflow, "list_checkpoints", lambda place: sorted([*list_checkpoints(place), (6, gone)]))
    assert main(sweep(run, "--follow")) == 0
    shown = capsys.readouterr()
    assert steps_of(shown.out) == [4, 8, 12]
    assert "step 6: removed meanwhile, passed over" in shown.err
    assert "waiting for step 16; the newest checkpoint is of step 12" in shown.err
    assert f"no trainer runs in {run}, whose newest checkpoint is of step 12 of 16" in shown.err
    shutil.rmtree(run / "checkpoints" / "step-000004")  # its result stays
    assert main(sweep(run)) == 0
    assert steps_of(capsys.readouterr().out) == [4, 8, 12]


def test_a_file_that_goes_while_it_is_read_is_named(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("mobillama.evaluate.model.sha256_file", lambda path: sha256_file(path.with_name("gone")))
    with pytest.raises(CorruptDataError, match="gone: No such file or directory while it was read"):
        find_model(str(small_model), tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "paper", "--benchmarks", "absent"], "absent: no such directory"),
        (["--suite", "paper", "--data", "d"], "--data: belongs to --suite perplexity alone"),
        (["--suite", "quick", "--baselines", "--all-checkpoints"], "--baselines: belongs to --suite perplexity alone"),
        (
            ["--suite", "quick", "--all-checkpoints", "--out", "o"],
            "--out: results of --all-checkpoints go into the run",
        ),
        (["--suite", "quick", "--follow"], "--follow: goes with --all-checkpoints"),
        (["--suite", "perplexity", "--baselines"], "--baselines: are computed on a hold-out"),
        (["--suite", "quick", "--all-checkpoints"], "no recipe.yaml there"),
        (["--suite", "quick", "--revisions", "ckpt_7"], "--revisions: belong to a repository of the hub, but"),
        (["--suite", "quick", "--out", __file__], f"--out: {__file__} is a file"),
        (["--suite", "quick", "--benchmarks", __file__], f"--benchmarks: {__file__} is a file"),
    ],
)
def test_wrong_use_exits_2(small_model, words, said, capsys):
    assert main(["evaluate", str(small_model), *words]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_suite_exits_2_and_help_says_what_each_is(small_model, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(small_model), "--suite", "papr"])
    assert "'papr'" in (said := capsys.readouterr().err) and "perplexity" in said
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{suite.name}: {suite.about}" in said for suite in SUITES.values()) and "cuda:N" in said


def test_limit_0_exits_2(small_model, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(small_model), "--suite", "quick", "--limit", "0"])
    assert "--limit: '0' is no whole number from 1 on" in capsys.readouterr().err


def test_all_that_is_no_model_is_named_before_anything_is_loaded(small_model, benchmarks, tmp_path, capsys):
    bare, mute = tmp_path / "bare", tmp_path / "mute"
    for directory, lacking in ((bare, "*.safetensors"), (mute, "tokenizer.*")):
        shutil.copytree(small_model, directory, ignore=shutil.ignore_patterns(lacking))
    file = small_model / "config.json"
    wrong = {tmp_path / "no": "no such directory", benchmarks: "no config.json", file: "is a file"}
    wrong |= {bare: "holds no weights", mute: "no tokenizer there (tokenizer.json or tokenizer.model)"}
    names = [str(name) for name in (small_model, *wrong)]
    assert main(["evaluate", *names, "--suite", "perplexity", "--out", str(tmp_path / "evals")]) == 2
    said = capsys.readouterr().err
    assert said.endswith("mobillama: 5 of 6 are no models to evaluate, so nothing was; mend or leave them out\n")
    assert all(f"{name}: {reason}" in said for name, reason in wrong.items())
    assert not (tmp_path / "evals").exists()


def test_the_hold_out_is_refused_to_other_architectures_before_anything_runs(small_model, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    words = ["--suite", "perplexity", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "evals")]
    assert main(["evaluate", str(small_model), str(other), *words]) == 2
    assert f"--data: reads only mobillama models; leave it out for {other}" in capsys.readouterr().err


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


def test_the_greatest_exit_code_of_several_failures_and_the_table_of_the_rest(
    small_model, benchmarks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MOBILLAMA_CACHE", str(tmp_path / "cache"))
    cut, alien = tmp_path / "cut", tmp_path / "alien"
    for directory in (alien, cut):
        shutil.copytree(small_model, directory)
    (alien / "config.json").write_text('{"model_type": "alien"}')
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    words = ["--suite", "perplexity", "--benchmarks", str(benchmarks), "--limit", "2", "--out", str(tmp_path / "evals")]
    assert main(["evaluate", str(alien), str(small_model), str(cut), *words]) == 4
    shown = capsys.readouterr()
    assert f"{alien}: failed: " in shown.err and f"{cut}: failed: " in shown.err
    assert shown.err.endswith("mobillama: 2 of 3 failed\n")
    assert "perplexity, only --limit 2: " in shown.out and "questions" in shown.out
