"""Sinks take all that metrics.jsonl holds, from the real packages; what a sink does wrong ends no run."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import run_cli
from mobillama.config import load_recipe
from mobillama.errors import UsageError
from mobillama.recipe import PretrainRecipe
from mobillama.train.loop import Silent, pretrain
from mobillama.train.records import Records


def needs(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"pip install {package} to run this test")


def recorded(run: Path) -> list[tuple[int, float]]:
    """Return the step and loss, or the seconds of a checkpoint, of each line of metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((line["step"], line["seconds"] if line["kind"] == "checkpoint" else line["loss"]) for line in lines)


def number_of(metrics: dict[str, float]) -> float:
    return next(metrics[name] for name in ("step/loss", "validation/loss", "checkpoint/seconds") if name in metrics)


def train(recipe_file: Path, sink: str, **variables: str) -> None:
    """Twelve steps, then one more run in another directory of the same name."""
    for folder in ("one", "other"):
        run = recipe_file.parent / folder / "run"
        done = run_cli(
            "pretrain", recipe_file, "--run", run, "--train.sink", sink, env={**os.environ, **variables}, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr, done.stderr
        assert done.stdout == f"{run}/checkpoints/step-000012/model\n"


def test_tensorboard_takes_all(recipe_file, tmp_path):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(load_recipe(PretrainRecipe, recipe_file, ["--train.sink", "tensorboard"]), Silent())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = ("step/loss", "validation/loss", "checkpoint/seconds")
    found = sorted((event.step, event.value) for name in names for event in events.Scalars(name))
    assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in recorded(tmp_path / "run")]


def test_trackio_takes_all_and_does_not_mix_two_runs_of_one_name(recipe_file, tmp_path):
    needs("trackio")
    train(recipe_file, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "mobillama.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    series: dict[str, list[tuple[int, float]]] = {}
    for name, step, metrics in rows:
        series.setdefault(name, []).append((step, number_of(json.loads(metrics))))
    assert sorted(map(sorted, series.values())) == sorted(recorded(tmp_path / run / "run") for run in ("one", "other"))


def test_wandb_takes_all_though_a_checkpoint_is_told_late(recipe_file, tmp_path):
    needs("wandb")
    train(recipe_file, "wandb", WANDB_MODE="offline")
    for folder in ("one", "other"):
        run = tmp_path / folder / "run"
        (file,) = run.glob("wandb/offline-run-*/*.wandb")
        found = [(int(metrics["after_step"]), number_of(metrics)) for metrics in wandb_history(file)]
        assert sorted(found) == recorded(run)
    ids = {file.name for file in tmp_path.glob("*/run/wandb/offline-run-*/*.wandb")}
    assert len(ids) == 2


def wandb_history(file: Path) -> list[dict[str, float]]:
    """Return what was logged: LevelDB's log format, 7 bytes of wandb's own ahead of it."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part, history = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(part).history.item
            if items:
                history.append({item.key or ".".join(item.nested_key): float(item.value_json) for item in items})
            part = b""
    return history


def test_a_sink_that_is_not_installed_or_does_not_start_is_named(recipe_file, tmp_path):
    for sink in ("trackio", "wandb"):
        if find_spec(sink) is None:
            with pytest.raises(UsageError, match=f"train.sink: needs {sink}; pip install {sink}"):
                pretrain(load_recipe(PretrainRecipe, recipe_file, ["--train.sink", sink]), Silent())
    needs("tensorboard")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(
        UsageError, match=r"train\.sink: tensorboard does not start \(.*\); mend that, or set it to none"
    ):
        pretrain(load_recipe(PretrainRecipe, recipe_file, ["--train.sink", "tensorboard"]), Silent())


def test_wandb_without_an_account_is_a_clear_error(recipe_file, tmp_path):
    needs("wandb")
    without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = run_cli("pretrain", recipe_file, "--train.sink", "wandb", env={**without, "HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "mobillama: train.sink: wandb does not start" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sink_that_fails_is_told_no_more_and_the_run_goes_on(tmp_path):
    class Full:
        def add(self, record):
            raise OSError(28, "No space left on device")

        def close(self):
            raise AssertionError("was told again")

    notes: list[str] = []
    records = Records(tmp_path, True, Full(), notes.append)
    with records.open({"kind": "run"}):
        for step in (1, 2):
            records.add({"kind": "step", "step": step, "loss": math.pi})
    assert len(notes) == 1
    assert "train.sink: failed ([Errno 28] No space left on device) and is told no more" in notes[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
