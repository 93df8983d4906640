"""Processes that train together compute what one does alone, and survive the loss of any of them (gloo, on the CPU)."""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_loop import assert_same_bits

from conftest import CONTEXT, run_cli
from mobillama.config import load_recipe
from mobillama.data.dataset import Dataset
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig, PretrainRecipe
from mobillama.record.chain import read_chain
from mobillama.train.checkpoint import list_checkpoints, newest_whole_checkpoint
from mobillama.train.device import autocast_to
from mobillama.train.loop import Silent, pretrain
from mobillama.train.objective import Objective
from mobillama.train.weights import fingerprint
from mobillama.train.world import World

SCRIPTS = Path(__file__).parent / "scripts"


def torchrun(processes: int, *words: object, options: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    return [*start, *map(str, words)]


def launch(processes: int, *words: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(processes, *words, options=options), capture_output=True, text=True, timeout=240, check=False
    )


def steps_of(run: Path) -> list[dict]:
    return [line for line in read_chain(run / "ledger.jsonl") if line["kind"] == "step"]


@pytest.fixture
def alone(recipe_file, tmp_path) -> Path:
    """The same run in one process."""
    run = tmp_path / "alone"
    pretrain(load_recipe(PretrainRecipe, recipe_file, ["--run", str(run)]), Silent())
    return run


@pytest.mark.parametrize(("kind", "processes"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_processes_together_compute_what_one_does_alone(recipe_file, alone, tmp_path, kind, processes):
    options = ["--train.parallelism", kind, "--train.shard_ranks", "2", "--train.micro_batch_size", "1"]
    done = launch(processes, "-m", "--", "mobillama", "pretrain", recipe_file, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("step-000012/model")  # said once, by the first process
    for ours, theirs in zip(steps_of(tmp_path / "run"), steps_of(alone), strict=True):
        assert ours["positions"] == theirs["positions"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)
        assert ours["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=1e-6)
    ours, theirs = (
        [line["bits_per_byte"] for line in read_chain(run / "ledger.jsonl") if line["kind"] == "validation"]
        for run in (tmp_path / "run", alone)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_muon_orthogonalises_whole_matrices_though_they_are_shared_out(recipe_file, tmp_path):
    """To the rounding of its bfloat16 iteration; a share of each matrix by itself would make other updates."""
    muon = ["--optimizer.kind", "muon", "--train.steps", "6"]
    done = launch(2, "-m", "--", "mobillama", "pretrain", recipe_file, *muon, "--train.parallelism", "fsdp")
    assert done.returncode == 0, done.stderr
    pretrain(load_recipe(PretrainRecipe, recipe_file, [*muon, "--run", str(tmp_path / "alone")]), Silent())
    ours, theirs = (newest_whole_checkpoint(tmp_path / run / "checkpoints")[0] for run in ("run", "alone"))
    start = MobiLlama(load_recipe(PretrainRecipe, recipe_file, []).model)
    initialise(start, load_recipe(PretrainRecipe, recipe_file, []).model, 7)
    mine, other = (load_file(path / "model" / "model.safetensors") for path in (ours, theirs))
    for name, weight in start.state_dict().items():
        moved, expected = mine[name] - weight, other[name] - weight
        assert (moved - expected).norm() < 0.1 * expected.norm(), name


def test_a_run_goes_on_in_another_number_of_processes(recipe_file, alone, tmp_path):
    """1 → 2 (FSDP) → 4 (HSDP) → 1: the same sequences, and losses that differ by rounding alone."""
    long = ["--train.steps", "60", "--train.checkpoint_every", "100", "--train.micro_batch_size", "1"]
    reference = ["--run", str(tmp_path / "one"), *long]
    pretrain(load_recipe(PretrainRecipe, recipe_file, reference), Silent())
    for processes, stop, kind in ((1, 2, "ddp"), (2, 4, "fsdp"), (4, 6, "hsdp"), (1, 99, "ddp")):
        options = [*long, "--train.parallelism", kind, "--train.shard_ranks", "2"]
        done = launch(processes, SCRIPTS / "stop_at.py", recipe_file, stop, *options)
        assert done.returncode == 0, done.stderr
        assert ("stopped" in done.stdout) == (stop != 99)
    ours, theirs = steps_of(tmp_path / "run"), steps_of(tmp_path / "one")
    assert [line["positions"] for line in ours] == [line["positions"] for line in theirs]
    for step in (3, 5, 7):  # the first after each resume
        assert ours[step - 1]["loss"] == pytest.approx(theirs[step - 1]["loss"], rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize(("share", "groups"), [("ffn", 3 + 1), ("none", 3 + 1), ("block", 1)])
def test_what_layers_share_is_gathered_and_reduced_once_a_step(recipe_file, tmp_path, share, groups):
    """A layer's own group is gathered for the forward and for the backward pass; the root's, once in two micro-batches."""
    options = ["--train.parallelism", "fsdp", "--model.share", share, "--train.micro_batch_size", "2"]
    done = launch(2, SCRIPTS / "count_collectives.py", recipe_file, tmp_path / "counts.json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "counts.json").read_text())
    counts = found["counts"]
    gathered = sum(count for name, count in counts.items() if "allgather" in name)
    reduced = sum(count for name, count in counts.items() if "reducescatter" in name)
    layers, micro_batches = groups - 1, 2
    assert gathered == 1 + micro_batches * 2 * layers
    assert reduced == groups
    config = load_recipe(PretrainRecipe, recipe_file, ["--model.share", share]).model
    model = MobiLlama(config)
    initialise(model, config, 7)
    assert found["fingerprint"] == fingerprint(model.state_dict(), World(0, 1, 1, next(model.parameters()).device))


def exact_shared_gradient(recipe: PretrainRecipe) -> dict[str, torch.Tensor]:
    """Return the first step's gradient as the float64 sum of the steps of separate, equal networks."""
    once = MobiLlama(recipe.model)
    initialise(once, recipe.model, recipe.seed)
    twin = MobiLlama(dataclasses.replace(recipe.model, share="none"))
    weights = once.state_dict()
    twin.load_state_dict({name: weights[re.sub(r"ffns\.\d+", "ffns.0", name)] for name in twin.state_dict()})
    objective = Objective(twin, 0.0, False, -1, autocast_to(recipe.train.precision, torch.device("cpu")))
    dataset, size, micro = Dataset(Path(recipe.data)), recipe.train.batch_size, recipe.train.micro_batch_size
    sums: dict[str, torch.Tensor] = {}
    for first in range(0, size, micro):
        ids = torch.from_numpy(dataset.batch(recipe.seed, 0, size, slice(first, first + micro)).ids)
        twin.zero_grad()
        (objective(ids)[0] / (size * (dataset.sequence_length - 1))).backward()
        for name, parameter in twin.named_parameters():
            shared = re.sub(r"ffns\.\d+", "ffns.0", name)
            sums[shared] = sums.get(shared, 0) + parameter.grad.double()
    return {name: gradient for name, gradient in sums.items() if "ffns" in name}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_shared_gradient_adds_up_in_float32_over_layers_micro_batches_and_processes(recipe_file, tmp_path, kind):
    """Sums in bfloat16, over the uses or between processes, are off by more than 1e-3."""
    words = ["--model.num_hidden_layers", "22", "--train.precision", "bfloat16", "--train.micro_batch_size", "2"]
    words += ["--optimizer.clip_norm", "0", "--train.parallelism", kind]
    done = launch(2, SCRIPTS / "shared_gradient.py", recipe_file, tmp_path / "gradient.safetensors", *words)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "gradient.safetensors")
    exact = exact_shared_gradient(load_recipe(PretrainRecipe, recipe_file, words))
    assert found.keys() == exact.keys() and len(exact) == 3
    for name, gradient in exact.items():
        assert float((found[name].double() - gradient).norm() / gradient.norm()) < 1e-6, name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fused_layers_give_the_same_gradient_over_micro_batches_and_processes(recipe_file, tmp_path, kind):
    words = ["--train.precision", "float32", "--train.micro_batch_size", "2", "--optimizer.clip_norm", "0"]
    exact = exact_shared_gradient(load_recipe(PretrainRecipe, recipe_file, words))
    words += ["--train.parallelism", kind, "--train.fused", "true"]
    done = launch(2, SCRIPTS / "shared_gradient.py", recipe_file, tmp_path / "gradient.safetensors", *words)
    assert done.returncode == 0, done.stderr
    assert "view tensor" not in done.stderr  # FSDP's warning of hooks that could be lost
    found = load_file(tmp_path / "gradient.safetensors")
    for name, gradient in exact.items():
        assert float((found[name].double() - gradient).norm() / gradient.norm()) < 1e-5, name


def test_a_fingerprint_tells_one_bit_and_two_swapped_numbers():
    config = ModelConfig(512, 16, 24, 2, 2)
    model = MobiLlama(config)
    initialise(model, config, 0)
    alone = World(0, 1, 1, next(model.parameters()).device)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = {fingerprint(whole, alone)}
    weight = whole["lm_head.weight"].view(-1).view(torch.int32)
    weight[100] ^= 1
    seen.add(fingerprint(whole, alone))
    weight[100] ^= 1
    weight[[3, 4]] = weight[[4, 3]]
    seen.add(fingerprint(whole, alone))
    assert len(seen) == 3


@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_process_is_noticed_and_torchrun_starts_all_anew(recipe_file, tmp_path, processes):
    long = ["--train.steps", "120", "--train.checkpoint_every", "5", "--train.micro_batch_size", "1"]
    long += ["--train.validate_every", "0"]
    words = ("-m", "--", "mobillama", "pretrain", recipe_file, *long, "--run")
    whole = launch(processes, *words, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        torchrun(processes, *words, tmp_path / "killed", options=("--max-restarts=3",)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    while process.poll() is None and len(list_checkpoints(checkpoints)) < 3:
        time.sleep(0.01)
    os.kill(rank_process(process.pid, processes - 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "resuming after step" in errors
    ours, theirs = steps_of(tmp_path / "killed"), steps_of(tmp_path / "whole")
    if processes == 2:  # the sum of two numbers has one order
        assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["positions"] == other["positions"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_process_that_fails_alone_in_mid_save_ends_all_and_the_save_is_kept(recipe_file, alone, data, tmp_path):
    """Only the second process reads the row that is damaged, while the checkpoint of step 4 is being flushed."""
    shutil.copytree(data, tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    row = int(dataset.rows_of_step(7, 5, 8)[6])
    chunk = bisect.bisect_right(dataset.chunk_ends, row)
    victim = sorted((tmp_path / "data" / "train").glob("chunk-*[0-9].npy"))[chunk]
    whole = victim.read_bytes()
    harmed = bytearray(whole)
    harmed[-(dataset.chunk_ends[chunk] - row) * (CONTEXT + 1) * 2] ^= 1
    victim.write_bytes(harmed)
    words = ("-m", "--", "mobillama", "pretrain", recipe_file, "--data", tmp_path / "data")
    done = launch(2, SCRIPTS / "slow_storage.py", *words[4:])
    assert "differs from what was prepared" in done.stderr
    assert re.search(r"rank +: 1 .*\n +exitcode +: 4 ", done.stderr), done.stderr  # torchrun's root cause
    assert "in pretrain" not in done.stderr  # no traceback of ours
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4]
    victim.write_bytes(whole)
    done = launch(2, *words)
    assert "resuming after step 4" in done.stderr
    for mine, other in zip(steps_of(tmp_path / "run"), steps_of(alone), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_process_killed_in_mid_save_ends_the_others_without_a_traceback(recipe_file, tmp_path):
    process = subprocess.Popen(
        torchrun(2, SCRIPTS / "slow_storage.py", recipe_file),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob(".step-000004.tmp/state.json")):
        time.sleep(0.01)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 ", errors), errors
    assert "in pretrain" not in errors
    assert newest_whole_checkpoint(checkpoints) in [(None, []), (checkpoints / "step-000004", [])]


def test_a_signal_to_torchrun_saves_once_though_it_comes_twice(recipe_file, tmp_path):
    words = ("-m", "--", "mobillama", "pretrain", recipe_file, "--train.steps", "100000")
    process = subprocess.Popen(
        torchrun(2, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not list_checkpoints(checkpoints):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or Slurm does: torchrun and its processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    (said,) = re.findall(r"saved after step (\d+); run the same command again", errors)
    assert list_checkpoints(checkpoints)[-1][0] == int(said)


def rank_process(parent: int, rank: int) -> int:
    """Return the process of a rank among torchrun's children."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            environment = (stat.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(fields[1]) == parent and f"RANK={rank}".encode() in environment:
            return int(stat.parent.name)
    raise AssertionError("the rank is not there")


def test_processes_that_cannot_share_a_batch_are_refused_with_one_message(recipe_file):
    done = launch(2, "-m", "--", "mobillama", "pretrain", recipe_file, "--train.batch_size", "3")
    assert done.returncode != 0
    assert "2 processes cannot share 3 sequences equally" in done.stderr


def test_a_second_run_in_the_directory_is_refused_for_all_processes(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("data: elsewhere\nrun: other\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    done = launch(2, "-m", "--", "mobillama", "pretrain", recipe_file)
    assert done.returncode != 0
    assert len(re.findall("^mobillama: .*use another run directory", done.stderr, re.M)) == 1
    assert "in pretrain" not in done.stderr  # no traceback of ours


def test_an_incomplete_environment_is_named(recipe_file):
    done = run_cli("pretrain", recipe_file, env={**os.environ, "WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert "WORLD_SIZE is set but RANK, LOCAL_RANK" in done.stderr
