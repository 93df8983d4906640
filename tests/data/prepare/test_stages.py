"""Executors and restarts: nothing but the input decides what a preparation makes, whatever ends it on the way."""

from __future__ import annotations

import dataclasses
import glob
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from conftest import run_cli
from mobillama.config import to_yaml
from mobillama.data.dataset import FORMAT
from mobillama.data.documents import read_texts
from mobillama.data.prepare import duplicates, pack, pipeline, plan, read
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.prepare.stages import Execution
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.recipe import CleanConfig, PrepareRecipe, SourceConfig
from mobillama.record.manifest import read_manifest, verify_manifest

CLEAN = CleanConfig(repair=True, exact_duplicates=True, near_duplicates=True)
KILLS = 20


class Writer:
    """Documents of invented words, and nearly equal ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(self.random.choices(letters, k=self.random.randint(2, 9))) for _ in range(2000)]

    def text(self) -> str:
        return " ".join(self.random.choices(self.words, k=self.random.randint(60, 240)))

    def nearly(self, text: str) -> str:
        words = text.split()
        words[self.random.randrange(len(words))] = "changed"
        return " ".join(words)


def write_lines(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


def write_sources(folder: Path, names: str, documents: int) -> dict[str, SourceConfig]:
    """Sources of three files each; each file after the first repeats earlier documents: equally, nearly, unrepaired."""
    writer, earlier, sources = Writer(seed=1), [], {}
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in ("0.jsonl", "1.jsonl.xz", "2.jsonl"):
            texts = [writer.text() for _ in range(documents)]
            repeated = writer.random.sample(earlier, min(len(earlier), documents // 10))
            texts += repeated + [writer.nearly(text) for text in repeated] + ["\ufeff" + text for text in repeated]
            earlier += texts[:documents]
            writer.random.shuffle(texts)
            write_lines(folder / name / file, texts)
        sources[name] = SourceConfig(str(folder / name), clean=CLEAN)
    return sources


def make_recipe(folder: Path, names: str, documents: int) -> PrepareRecipe:
    sources = write_sources(folder / "corpus", names, documents)
    train_tokenizer(read_texts([folder / "corpus" / names[0]]), 384, folder / "small.model")
    return PrepareRecipe(
        sources=sources, tokenizer=str(folder / "small.model"), sequence_length=65, holdout=0.05, chunks=7, seed=3
    )


def write_recipe(folder: Path, recipe: PrepareRecipe) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> PrepareRecipe:
    """Two sources with duplicates of every kind, within and across them."""
    return make_recipe(tmp_path_factory.mktemp("recipe"), "ab", 60)


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory) -> bytes:
    """The manifest of that recipe, made by one process."""
    out = tmp_path_factory.mktemp("expected") / "out"
    manifest = prepare(recipe, out)
    for source in manifest["sources"]:
        assert source["verdicts"].keys() == {"exact_duplicate", "near_duplicate"}
    return (out / "manifest.json").read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_what_is_made(recipe, expected, tmp_path, workers):
    told: dict[str, list[tuple[float, float]]] = {}

    def progress(stage, done, total):
        told.setdefault(stage, []).append((done, total))

    prepare(recipe, tmp_path / "out", progress, Execution(workers=workers))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for amounts in told.values():
        assert [done for done, _ in amounts] == sorted(done for done, _ in amounts)
        assert amounts[-1][0] == amounts[-1][1] > 0


def test_sizes_of_tasks_runs_and_blocks_do_not_change_what_is_made(recipe, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_TASK_BYTES", 10_000)
    monkeypatch.setattr(read, "_DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr(read, "_BYTES_AT_ONCE", 5_000)
    monkeypatch.setattr(duplicates.ExactPairs, "per_partition", 50)
    monkeypatch.setattr(duplicates.NearPairs, "per_partition", 50)
    monkeypatch.setattr(pack, "_RUN_BYTES", 20_000)
    monkeypatch.setattr(pack, "_BLOCK_BYTES", 3_000)
    monkeypatch.setattr(pack, "_ROWS_AT_ONCE", 5)
    assert len(plan.read_tasks(recipe, plan.find_inputs(recipe))) > 20
    prepare(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected


def start(recipe: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    """Start a preparation as the leader of a process group of its own."""
    words = ["data", "prepare", recipe, "--out", out, "--workers", workers]
    return subprocess.Popen(
        [sys.executable, "-m", "mobillama", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


def processes(group: int) -> dict[int, int]:
    """Return the living processes of a group, and the parent of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def wait_for_end(group: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while left := processes(group):
        assert time.monotonic() < until, f"processes {left} outlived their parent"
        time.sleep(0.02)


def is_quiet(text: str) -> bool:
    """Tell whether standard error is free of logs, tracebacks and an interpreter's warnings."""
    return not re.search(r"Traceback|Error|Warning|leaked|\d\d:\d\d:\d\d", text)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> tuple[Path, bytes, float]:
    """A preparation of a few seconds: its recipe, its manifest, and how long it takes."""
    folder = tmp_path_factory.mktemp("long")
    recipe = make_recipe(folder, "abcdef", 400)
    path = write_recipe(folder, recipe)
    started = time.monotonic()
    process = start(path, folder / "out", 2)
    assert process.communicate(timeout=120) is not None
    assert process.returncode == 0
    return path, (folder / "out" / "manifest.json").read_bytes(), time.monotonic() - started


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(long, tmp_path):
    recipe, manifest, seconds = long
    generator = random.Random(5)
    out, most, kills, ends = tmp_path / "out", 0, 0, 0

    def done() -> int:
        # Not pathlib's, which raises where the run removes a directory meanwhile.
        return len(glob.glob(f"{tmp_path}/out.partial/stages/*/completions/*"))

    while kills < KILLS or not ends:
        process = start(recipe, out, 2)
        by_time = kills < KILLS // 2  # this meets the long stages, finished tasks meet the short ones
        moment, goal = time.monotonic() + generator.uniform(0.1, 0.6) * seconds, done() + generator.randint(1, 15)
        while process.poll() is None and (kills == KILLS or (time.monotonic() < moment if by_time else done() < goal)):
            time.sleep(0.005)
        if process.poll() is None:
            most = max(most, len(processes(process.pid)))
            kills += 1
            if kills % 2:  # the workers become orphans
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        else:
            ends += 1
            assert process.returncode == 0
            assert (out / "manifest.json").read_bytes() == manifest
            verify_manifest(out, read_manifest(out, FORMAT))
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            shutil.rmtree(out)
        wait_for_end(process.pid, 2)
        process.communicate()
    assert most >= 4  # parent, fork server, two workers


def test_what_killed_attempts_left_is_no_part_of_the_data(recipe, expected, tmp_path, monkeypatch):
    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.os, "rename", killed)  # the last step
        prepare(recipe, tmp_path / "out")
    result = tmp_path / "out.partial" / "result"
    for folder in (result, result / "train", result / "documents", result.parent / "documents"):
        (folder / ".chunk.npy.123.tmp").write_bytes(b"half")  # what a write that is killed leaves
    manifest = prepare(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == expected
    verify_manifest(tmp_path / "out", manifest)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_it_at_once_and_quietly(long, tmp_path, workers):
    recipe, manifest, _ = long
    out, generator = tmp_path / "out", random.Random(workers)
    for _ in range(4):
        process = start(recipe, out, workers)
        assert process.stderr.readline().startswith("hash raw files")
        time.sleep(generator.uniform(0, 1))
        os.killpg(process.pid, signal.SIGINT)
        interrupted = time.monotonic()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130, said
        assert time.monotonic() - interrupted < 5
        assert is_quiet(said), said
        wait_for_end(process.pid, 2)
    assert start(recipe, out, workers).wait(120) == 0
    assert (out / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_while_a_worker_is_started_is_quiet_too(long, tmp_path, moment):
    """It comes when the fork server is up and is about to be asked for a second worker, or that one for its work."""
    recipe, *_ = long
    script = f"""
import os, signal, sys
from multiprocessing import reduction
from mobillama.cli import main
whole, calls = reduction.sendfds, []
def sendfds(*words):
    calls.append(words)
    if len(calls) == 2 and {moment == "before"}:
        os.killpg(0, signal.SIGINT)
    whole(*words)
    if len(calls) == 2 and {moment == "after"}:
        os.killpg(0, signal.SIGINT)
reduction.sendfds = sendfds
sys.exit(main(["data", "prepare", {str(recipe)!r}, "--out", {str(tmp_path / "out")!r}, "--workers", "2"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert is_quiet(said), said
    wait_for_end(process.pid, 2)


def test_a_worker_that_is_killed_is_noticed(long, tmp_path):
    recipe, *_ = long
    process = start(recipe, tmp_path / "out", 2)
    workers: list[int] = []
    while len(workers) < 2:  # the children of the fork server, which is a child of the process
        family = processes(process.pid)
        workers = [child for child, parent in family.items() if family.get(parent) == process.pid]
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    *progress, error = said.splitlines()
    assert is_quiet("\n".join(progress)), said
    assert "a worker process was killed" in error and "use fewer --workers" in error
    wait_for_end(process.pid, 2)


def bad_json(folder: Path) -> tuple[int, str]:
    lines = (folder / "2.jsonl").read_text().splitlines(keepends=True)
    (folder / "2.jsonl").write_text("".join([*lines[:17], '{"text": \n', *lines[17:]]))
    return 4, "2.jsonl:18: not valid JSON"


def cut_archive(folder: Path) -> tuple[int, str]:
    path = folder / "1.jsonl.xz"
    path.write_bytes(path.read_bytes()[:-40])
    return 4, "1.jsonl.xz: damaged or truncated archive"


def other_column(folder: Path) -> tuple[int, str]:
    parquet.write_table(pyarrow.table({"content": ["a"]}), folder / "3.parquet")
    return 2, "3.parquet: no column 'text' among content"


@pytest.mark.parametrize("harm", [bad_json, cut_archive, other_column])
def test_errors_of_workers_come_through_in_one_line(recipe, tmp_path, harm):
    sources = write_sources(tmp_path / "corpus", "ab", 20)
    path = write_recipe(tmp_path, dataclasses.replace(recipe, sources=sources))
    code, said = harm(tmp_path / "corpus" / "b")
    errors = set()
    for workers in (1, 2):
        done = run_cli("data", "prepare", path, "--out", tmp_path / "out", "--workers", workers)
        assert done.returncode == code
        *progress, error = done.stderr.splitlines()
        assert is_quiet("\n".join(progress)), done.stderr
        assert said in error
        errors.add(error)
    assert len(errors) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus", "recipe.yaml"]


@pytest.mark.parametrize(("kilobytes", "workers"), [(1, 1), (16, 2), (64, 1), (128, 2)])
def test_a_full_disk_is_named_and_the_same_command_goes_on(recipe, expected, tmp_path, kilobytes, workers):
    path, out = write_recipe(tmp_path, recipe), tmp_path / "out"
    command = ("data", "prepare", path, "--out", out, "--workers", workers)
    limit = kilobytes << 10
    full = run_cli(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2, full.stderr
    *progress, error = full.stderr.splitlines()
    assert is_quiet("\n".join(progress)), full.stderr
    assert str(out.parent) in error
    assert "File too large; free space" in error
    assert run_cli(*command).returncode == 0
    assert (out / "manifest.json").read_bytes() == expected
