"""A run that is killed, stopped or restarted computes the same numbers as one that was not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import run_cli
from mobillama.config import load_recipe
from mobillama.data.dataset import Dataset
from mobillama.data.prepare.pipeline import prepare
from mobillama.directory import load_model
from mobillama.errors import CorruptDataError, DivergedError, Stopped, UsageError
from mobillama.recipe import PretrainRecipe
from mobillama.record.chain import read_chain
from mobillama.report.picture import draw_loss
from mobillama.train import saver
from mobillama.train.checkpoint import list_checkpoints, newest_whole_checkpoint
from mobillama.train.loop import Silent, pretrain
from mobillama.train.objective import document_ids
from mobillama.train.step import Computed, Stepper
from mobillama.train.weights import fingerprint
from mobillama.train.world import World
from train_support import StopAt

COMPUTED = ("kind", "step", "loss", "loss_by_source", "gradient_norm", "learning_rate", "tokens", "bits_per_byte")


def recipe_of(path: Path, *overrides: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, path, overrides)


def outcome(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Return what a run computed: its whole series, and its last weights and moments."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _, last = list_checkpoints(run / "checkpoints")[-1]
    tensors = {file.name + name: t for file in last.rglob("*.safetensors") for name, t in load_file(file).items()}
    computed = (line for line in lines if line["kind"] != "checkpoint")  # its line comes when the next save does
    return [{key: line[key] for key in COMPUTED if key in line} for line in computed], tensors


def assert_same_bits(one: Path, other: Path, same_cadence: bool = True) -> None:
    (series, tensors), (expected_series, expected) = outcome(one), outcome(other)
    assert series == expected_series
    ledgers = [list(read_chain(run / "ledger.jsonl")) for run in (one, other)]
    assert ledgers[0] == ledgers[1] or not same_cadence
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_a_run_learns_and_leaves_a_self_contained_directory(recipe_file, tmp_path):
    pretrain(recipe_of(recipe_file, "--train.steps", "60", "--train.validate_every", "30"), Silent())
    run = tmp_path / "run"
    series, tensors = outcome(run)
    steps = [line for line in series if line["kind"] == "step"]
    validations = [line for line in series if line["kind"] == "validation"]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert steps[0]["loss"] == pytest.approx(6.238, abs=0.02)  # ln 512
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.8
    assert validations[1]["bits_per_byte"] < validations[0]["bits_per_byte"] < 4.3
    assert {p.name for p in run.iterdir()} >= {"recipe.yaml", "environment.json", "data-manifest.json", "metrics.jsonl"}
    assert sum("ffn" in name and name.startswith("model") for name in tensors) == 3
    means = [sum(line["loss_by_source"].values()) / len(line["loss_by_source"]) for line in steps]
    assert means[-1] == pytest.approx(steps[-1]["loss"], rel=0.3)


def test_accumulation_gives_the_same_step_as_one_large_micro_batch(recipe_file, tmp_path):
    pretrain(recipe_of(recipe_file, "--train.micro_batch_size", "8"), Silent())
    pretrain(recipe_of(recipe_file, "--train.micro_batch_size", "3", "--run", str(tmp_path / "other")), Silent())
    whole, divided = outcome(tmp_path / "run")[0], outcome(tmp_path / "other")[0]
    for a, b in zip(whole, divided, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_tied_head_learns_is_stored_once_and_resumes_bit_identically(recipe_file, tmp_path):
    tied = ("--model.tie_word_embeddings", "true")
    pretrain(recipe_of(recipe_file, *tied), Silent())
    other = recipe_of(recipe_file, *tied, "--run", str(tmp_path / "other"))
    with pytest.raises(Stopped, match="saved after step 5"):
        pretrain(other, StopAt(5))
    pretrain(other, Silent())
    assert_same_bits(tmp_path / "other", tmp_path / "run", same_cadence=False)
    series, tensors = outcome(tmp_path / "run")
    assert not any("lm_head" in name for name in tensors)
    assert series[-1]["loss"] < 6.2
    model = load_model(list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1] / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_two_resumes_in_a_row_across_an_epoch_border_are_bit_identical(recipe_file, data, tmp_path):
    steps = Dataset(data).size // 8 + 8  # the last steps are in the second epoch
    pretrain(recipe_of(recipe_file, "--train.steps", str(steps)), Silent())

    second = recipe_of(recipe_file, "--train.steps", str(steps), "--run", str(tmp_path / "second"))
    for stop in (3, steps - 4):
        with pytest.raises(Stopped, match=f"saved after step {stop}"):
            pretrain(second, StopAt(stop))
    reporter = Silent()
    pretrain(second, reporter)
    assert any(f"resuming after step {steps - 4}" in note for note in reporter.notes)
    assert_same_bits(tmp_path / "second", tmp_path / "run", same_cadence=False)
    reporter = Silent()
    pretrain(second, reporter)
    assert f"all {steps} steps are done" in reporter.notes[-1]


def test_kill_9_at_20_random_moments_loses_nothing(recipe_file, data, tmp_path):
    """Ten kills at random times, ten when a save is seen under way; every restart is the same command."""
    steps = str(Dataset(data).size // 8 + 200)
    options = ["--train.steps", steps, "--train.checkpoint_every", "3", "--train.keep_checkpoints", "3"]
    run_cli("pretrain", recipe_file, *options)
    killed = [*options, "--run", str(tmp_path / "killed")]
    checkpoints = tmp_path / "killed" / "checkpoints"
    choose = random.Random(0)
    kills = inside_a_save = 0
    while kills < 20:
        before = len(list_checkpoints(checkpoints)) and list_checkpoints(checkpoints)[-1][0]
        command = [sys.executable, "-m", "mobillama", "pretrain", str(recipe_file), *killed]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_progress(process, checkpoints, before)
        if kills % 2:
            time.sleep(choose.random() * 0.3)
        else:
            while process.poll() is None and not list(checkpoints.glob(".step-*.tmp")):
                time.sleep(0.0005)
            time.sleep(choose.random() * 0.01)
        assert process.poll() is None, "the run ended before it could be killed; make it longer"
        process.kill()
        process.wait()
        kills += 1
        committed = {path for _, path in list_checkpoints(checkpoints)}
        inside_a_save += any(path not in committed for path in checkpoints.iterdir())
    assert inside_a_save >= 3
    finished = run_cli("pretrain", recipe_file, *killed)
    assert finished.returncode == 0, finished.stderr
    assert_same_bits(tmp_path / "killed", tmp_path / "run")
    assert not list(checkpoints.glob(".*"))


def wait_for_progress(process: subprocess.Popen, checkpoints: Path, before: int) -> None:
    """Wait until the run has committed a checkpoint beyond ``before``, so that every kill follows a resume."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        found = list_checkpoints(checkpoints)
        if found and found[-1][0] > before:
            return
        time.sleep(0.005)
    pytest.fail(f"no progress after step {before}; exit code {process.poll()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_second_leaves_at_once(recipe_file, tmp_path, number):
    command = [sys.executable, "-m", "mobillama", "pretrain", str(recipe_file), "--train.steps", "100000"]
    metrics = tmp_path / "run" / "metrics.jsonl"

    def started() -> subprocess.Popen:
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) <= lines):
            time.sleep(0.01)
        return process

    process = started()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0]
    assert max(json.loads(line)["step"] for line in metrics.read_text().splitlines()) == saved
    process = started()
    process.send_signal(signal.SIGSTOP)  # both signals wait, so that the second finds the first one's save not begun
    process.send_signal(number)
    other = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
    process.send_signal(signal.SIGCONT)
    while "once more" not in process.stderr.readline():
        pass
    process.send_signal(other)
    process.communicate(timeout=30)
    assert process.returncode in (75, -other)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(recipe_file, tmp_path, harm):
    pretrain(recipe_of(recipe_file), Silent())
    pretrain(recipe_of(recipe_file, "--run", str(tmp_path / "other")), Silent())
    victim = tmp_path / "run" / "checkpoints" / "step-000012" / "model" / "model.safetensors"
    damage(victim, harm)
    reporter = Silent()
    pretrain(recipe_of(recipe_file), reporter)
    assert "using an older checkpoint" in reporter.notes[0]
    assert "resuming after step 8" in reporter.notes[1]
    assert_same_bits(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_data_that_are_not_all_there_stop_a_run_before_its_first_step(data, recipe_file, tmp_path, harm):
    shutil.copytree(data, tmp_path / "data")
    victim = sorted((tmp_path / "data" / "train").glob("chunk-*[0-9].npy"))[-1]
    damage(victim, harm)
    with pytest.raises(CorruptDataError, match=victim.name):
        pretrain(recipe_of(recipe_file, "--data", str(tmp_path / "data")), Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", ["flip", "swap"])
def test_a_corrupt_or_swapped_chunk_is_caught_before_its_batch_is_used(data, recipe_file, tmp_path, harm):
    """The run stops after the steps whose sequences are whole; with the chunk restored it ends as if nothing had been."""
    shutil.copytree(data, tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    one, other = (tmp_path / "data" / "train" / f"chunk-0000{number}.npy" for number in (1, 3))
    contents = one.read_bytes(), other.read_bytes()
    if harm == "flip":
        one.write_bytes(contents[0][:-1] + bytes([contents[0][-1] ^ 1]))
        good = dataset.chunk_ends[1] - 1  # the damaged sequence is the chunk's last
    else:
        assert len(contents[0]) == len(contents[1])
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
        good = dataset.chunk_ends[0]
    options = ["--data", str(tmp_path / "data"), "--train.steps", str(good // 8 + 4), "--train.checkpoint_every", "50"]
    with pytest.raises(CorruptDataError, match=r"chunk-00001\.npy: sequence \d+ differs from what was prepared"):
        pretrain(recipe_of(recipe_file, *options), Silent())
    steps = [line["step"] for line in read_chain(tmp_path / "run" / "ledger.jsonl") if line["kind"] == "step"]
    assert steps[-1] == good // 8
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])
    pretrain(recipe_of(recipe_file, *options), Silent())
    pretrain(recipe_of(recipe_file, *options, "--run", str(tmp_path / "other")), Silent())
    assert_same_bits(tmp_path / "run", tmp_path / "other")


def damage(victim: Path, harm: str) -> None:
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "flip":
        victim.write_bytes(content)
    elif harm == "truncate":
        victim.write_bytes(content[:-1])
    else:
        victim.unlink()


def test_when_every_checkpoint_is_damaged_the_run_stops_and_nothing_is_touched(recipe_file, tmp_path):
    pretrain(recipe_of(recipe_file), Silent())
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        damage(next((path / "optimizer").iterdir()), "flip")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CorruptDataError, match=r"optimizer/.*\.safetensors.*no other checkpoint is whole"):
        pretrain(recipe_of(recipe_file), Silent())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 3


def test_two_trainers_cannot_share_a_run_directory(recipe_file, tmp_path):
    command = [sys.executable, "-m", "mobillama", "pretrain", str(recipe_file), "--train.steps", "100000"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.01)
    second = run_cli("pretrain", recipe_file, "--train.steps", "100000")
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert f"a trainer already runs here (process {first.pid})" in second.stderr


def test_another_recipe_or_other_data_cannot_take_over_a_run(recipe_file, prepare_recipe, tmp_path):
    pretrain(recipe_of(recipe_file), Silent())
    with pytest.raises(UsageError, match=r"optimizer\.learning_rate = 0\.003, the recipe says 0\.1"):
        pretrain(recipe_of(recipe_file, "--optimizer.learning_rate", "0.1"), Silent())
    prepare(dataclasses.replace(prepare_recipe, seed=1), tmp_path / "other-data")
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(UsageError, match="learns from other data"):
        pretrain(recipe_of(recipe_file, "--data", str(tmp_path / "other-data")), Silent())
    assert files == {path: path.read_bytes() for path in files}
    pretrain(recipe_of(recipe_file, "--train.micro_batch_size", "2"), Silent())


def test_model_and_data_that_do_not_fit_are_refused(recipe_file):
    with pytest.raises(UsageError, match=r"model\.vocab_size: 600.*has 512 ids"):
        pretrain(recipe_of(recipe_file, "--model.vocab_size", "600"), Silent())
    with pytest.raises(UsageError, match=r"model\.max_position_embeddings: 63 is shorter than the 64"):
        pretrain(recipe_of(recipe_file, "--model.max_position_embeddings", "63"), Silent())
    with pytest.raises(UsageError, match=r"train\.float8: CPU, \d+ threads multiplies no float8"):
        pretrain(recipe_of(recipe_file, "--train.float8", "true", "--train.device", "cpu"), Silent())
    with pytest.raises(UsageError, match="unknown device 'tpu9'"):
        pretrain(recipe_of(recipe_file, "--train.device", "tpu9"), Silent())


def test_divergence_stops_with_the_last_good_checkpoint(recipe_file, tmp_path):
    wild = ["--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", "0", "--train.checkpoint_every", "1"]
    with pytest.raises(DivergedError, match=r"step \d+: loss nan.*lower optimizer\.learning_rate") as caught:
        pretrain(recipe_of(recipe_file, *wild), Silent())
    assert caught.value.exit_code == 5
    good, _ = newest_whole_checkpoint(tmp_path / "run" / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in load_file(good / "model" / "model.safetensors").values())
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


class Poisoned:
    """Makes the gradient of chosen steps bad, as a cosmic ray or a bad batch would."""

    def __init__(self, monkeypatch, bad: dict[int, float]) -> None:
        whole = Stepper.gradient
        self.seen: list[int] = []

        def gradient(stepper: Stepper, step: int, limit: float) -> Computed:
            self.seen.append(step)

            def strike(weight: torch.Tensor) -> None:
                weight.grad.mul_(bad.get(step, 1.0))

            ray = stepper.model.lm_head.weight.register_post_accumulate_grad_hook(strike)
            computed = whole(stepper, step, limit)
            ray.remove()
            return computed

        monkeypatch.setattr(Stepper, "gradient", gradient)


def test_twenty_bad_steps_are_skipped_and_the_weights_never_see_them(recipe_file, tmp_path, monkeypatch):
    random_steps = random.Random(0).sample(range(20, 60), 20)
    bad = {step: (math.nan, math.inf, 1000.0)[n % 3] for n, step in enumerate(random_steps)}
    Poisoned(monkeypatch, bad)
    policy = ["--faults.spike_factor", "20", "--faults.max_skips", "20", "--train.steps", "60"]
    reporter = Silent()
    pretrain(recipe_of(recipe_file, *policy), reporter)
    lines = list(read_chain(tmp_path / "run" / "ledger.jsonl"))
    faults = {line["step"] - 1: line["fault"] for line in lines if "fault" in line}
    assert faults == {step: "spike" if factor == 1000.0 else "not finite" for step, factor in bad.items()}
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(
            tensor.isfinite().all() for file in path.rglob("*.safetensors") for tensor in load_file(file).values()
        )
    losses = [line["loss"] for line in lines if line["kind"] == "step" and "fault" not in line]
    assert losses[-1] < losses[0] - 0.3
    draw_loss(tmp_path / "run", tmp_path / "loss.png")


def test_too_many_bad_steps_roll_back_once_and_then_stop_and_a_resume_does_the_same(recipe_file, tmp_path, monkeypatch):
    poisoned = Poisoned(monkeypatch, dict.fromkeys((25, 26, 27), math.nan) | dict.fromkeys((35, 36, 37), math.nan))
    asked = ["--faults.max_skips", "2", "--faults.max_rollbacks", "1", "--train.steps", "40"]
    asked += ["--train.checkpoint_every", "10"]
    with pytest.raises(DivergedError, match=r"step 38: .*faults allows no more"):
        pretrain(recipe_of(recipe_file, *asked), Silent())
    # 20 to 27 once; back to 20; 20 to 27 passed over; 30 saved; 35 to 37 bad: no further rollback
    assert poisoned.seen == [*range(28), *range(28, 38)]
    ledger = tmp_path / "run" / "ledger.jsonl"
    lines = list(read_chain(ledger))
    assert [(line["step"], line["to"]) for line in lines if line["kind"] == "rollback"] == [(28, 20)]
    assert [line["step"] for line in lines if line.get("fault") == "passed over"] == list(range(21, 29))
    before = ledger.read_bytes()
    with pytest.raises(DivergedError):
        pretrain(recipe_of(recipe_file, *asked), Silent())
    assert ledger.read_bytes() == before


def test_bfloat16_training_learns_too(recipe_file, tmp_path):
    pretrain(recipe_of(recipe_file, "--train.precision", "bfloat16", "--train.steps", "40"), Silent())
    series, tensors = outcome(tmp_path / "run")
    losses = [line["loss"] for line in series if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_documents_do_not_see_each_other_when_they_are_masked(recipe_file, data, tmp_path):
    """Changing a sequence's first document changes no loss of its other documents."""
    ids = torch.from_numpy(Dataset(data).batch(0, 0, Dataset(data).size).ids)
    eos = Dataset(data).tokenizer.eos_id
    row = next(row for row in ids if eos in row[2:-9])
    first = row.tolist().index(eos, 2)
    other = row.clone()
    other[:first] = torch.where(row[:first] == eos, eos, (row[:first] + 7) % 200 + 3)
    recipe = recipe_of(recipe_file, "--train.mask_documents", "true", "--model.qk_norm", "true")
    pretrain(recipe, Silent())
    (_, last), *_ = list_checkpoints(tmp_path / "run" / "checkpoints")[::-1]
    model = load_model(last / "model")
    both = torch.stack((row, other))[:, :-1]
    documents = document_ids(both, eos)
    assert int(documents[0, first + 1]) == int(documents[0, first]) + 1
    with torch.no_grad():
        masked, open_ = model(both, document_ids=documents), model(both)
    torch.testing.assert_close(masked[0, first + 1 :], masked[1, first + 1 :])
    assert not torch.allclose(open_[0, first + 1 :], open_[1, first + 1 :])


def test_what_modern_recipes_ask_for_trains_and_resumes_with_the_same_bits(recipe_file, tmp_path):
    asked = ["--optimizer.kind", "muon", "--optimizer.schedule", "wsd", "--train.z_loss", "1e-4"]
    asked += ["--train.mask_documents", "true", "--model.qk_norm", "true", "--model.scale_residual_init", "true"]
    asked += ["--train.steps", "40", "--train.checkpoint_every", "10"]
    pretrain(recipe_of(recipe_file, *asked), Silent())
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    for _, path in list_checkpoints(tmp_path / "killed" / "checkpoints")[2:]:
        shutil.rmtree(path)
    pretrain(recipe_of(recipe_file, *asked, "--run", str(tmp_path / "killed")), Silent())
    assert_same_bits(tmp_path / "killed", tmp_path / "run")
    losses = [line["loss"] for line in outcome(tmp_path / "run")[0] if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5


def test_lost_checkpoints_are_not_taken_for_a_fresh_start(recipe_file, tmp_path):
    pretrain(recipe_of(recipe_file), Silent())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match=r"records 12 steps, but .* holds no checkpoint"):
        pretrain(recipe_of(recipe_file), Silent())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_another_precision_cannot_continue_a_run(recipe_file):
    options = ["--train.precision", "auto", "--train.steps", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mobillama.train.device._has_fast_bfloat16", lambda device: False)
        pretrain(recipe_of(recipe_file, *options), Silent())
        patch.setattr("mobillama.train.device._has_fast_bfloat16", lambda device: True)
        with pytest.raises(UsageError, match=r"computed in float32.*set train\.precision to float32"):
            pretrain(recipe_of(recipe_file, *options), Silent())


def test_a_data_set_without_hold_out_has_no_validation(recipe_file, prepare_recipe, tmp_path):
    prepare(dataclasses.replace(prepare_recipe, holdout=0.0), tmp_path / "all")
    pretrain(recipe_of(recipe_file, "--data", str(tmp_path / "all")), Silent())
    assert "validation" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_slow_storage_stalls_no_step_but_the_next_save_and_is_told(recipe_file, tmp_path, monkeypatch):
    flush = saver.fsync_tree
    monkeypatch.setattr(saver, "fsync_tree", lambda path: (time.sleep(2), flush(path)))
    monkeypatch.setattr(saver, "_PATIENCE", 0.5)
    reporter = Silent()
    pretrain(recipe_of(recipe_file), reporter)
    told = [note for note in reporter.notes if "training stood still" in note]
    assert len(told) == 3
    assert any("step-000004: training waits for its files" in note for note in reporter.notes)
    assert "save less often (train.checkpoint_every) or to faster storage" in told[0]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "checkpoint" and r["held_up"] > 1] == [4, 8, 12]
    assert max(r["seconds"] for r in records if r["kind"] == "step") < 1.5
    monkeypatch.undo()
    pretrain(recipe_of(recipe_file, "--run", str(tmp_path / "other")), Silent())
    assert_same_bits(tmp_path / "run", tmp_path / "other")


def test_a_signal_in_mid_save_waits_for_it_and_saves(recipe_file, tmp_path, monkeypatch):
    commit, sent = saver.write_manifest, []

    def slow(*words):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        time.sleep(0.5)
        return commit(*words)

    monkeypatch.setattr(saver, "write_manifest", slow)
    with pytest.raises(Stopped) as stopped:
        pretrain(recipe_of(recipe_file), Silent())
    assert stopped.value.exit_code == 75
    monkeypatch.undo()
    whole = [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")]
    stopped_at = [line["step"] for line in read_chain(tmp_path / "run" / "ledger.jsonl") if "step" in line][-1]
    assert whole[0] == 4 and whole[-1] == stopped_at < 12
    pretrain(recipe_of(recipe_file), Silent())
    pretrain(recipe_of(recipe_file, "--run", str(tmp_path / "other")), Silent())
    assert_same_bits(tmp_path / "run", tmp_path / "other", same_cadence=False)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(recipe_file, tmp_path):
    """The trainer's own error on a file system of half a mebibyte, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        done = run_cli("pretrain", recipe_file, "--run", small / "run", "--train.steps", "100")
        assert done.returncode == 2
        assert "cannot be written (No space left on device); free space and run the same command again" in done.stderr
        checkpoints = small / "run" / "checkpoints"
        assert newest_whole_checkpoint(checkpoints)[0] is not None
        assert not list(checkpoints.glob(".*"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_steps_tell_what_they_took_and_weights_are_looked_at(recipe_file, tmp_path):
    pretrain(recipe_of(recipe_file, "--train.inspect_every", "4"), Silent())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert all(step["tokens_per_second"] > 0 and step["data_wait"] >= 0 and step["memory_gib"] > 0 for step in steps)
    assert steps[0]["bits_per_byte"] == pytest.approx(steps[0]["loss"] / math.log(2) / 1.6, rel=0.3)  # bytes a token
    ratios = [step["update_ratio"] for step in steps if "update_ratio" in step]
    assert len(ratios) == 3
    assert set(ratios[0]) == {"embedding", "attention", "feed-forward", "norms", "head"}
    assert all(0 < ratio < 1 for ratio in ratios[0].values())
    prints = [line["weights"] for line in read_chain(tmp_path / "run" / "ledger.jsonl") if "weights" in line]
    assert len(set(prints)) == 3
    last = load_file(newest_whole_checkpoint(tmp_path / "run" / "checkpoints")[0] / "model" / "model.safetensors")
    assert prints[-1] == fingerprint(last, World(0, 1, 1, torch.device("cpu")))
