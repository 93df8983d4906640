"""The bench: real processes of small models, taking turns."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from conftest import directory_of, run_cli
from mobillama.deploy.bench import Contender, Settings, Worker, _take_turn, contenders, measure, thread_counts
from mobillama.deploy.gguf import export_gguf
from mobillama.deploy.onnx import export_onnx
from mobillama.engine.blocks import Q4_0
from mobillama.errors import MobiLlamaError, UsageError


@pytest.fixture(scope="module")
def models(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    source = directory_of(tokenizer_path, folder / "model")
    export_onnx(source, folder / "onnx", tokens=50)
    for name, shared in (("shared", True), ("unshared", False)):
        export_gguf(source, folder / f"{name}.gguf", Q4_0, shared, tokens=50)
    return folder


def test_each_model_is_measured_in_the_engine_that_it_was_made_for(models):
    paths = [models / name for name in ("model", "onnx", "shared.gguf", "unshared.gguf")]
    found = contenders(paths, "auto", "/some/python")
    assert [(each.path.name, each.engine) for each in found] == [
        ("model", "torch"),
        ("onnx", "onnxruntime"),
        ("shared.gguf", "native"),
        ("unshared.gguf", "native"),
        ("unshared.gguf", "llama.cpp"),
    ]
    assert found[4].python == "/some/python" and found[0].python == sys.executable
    assert [each.path.name for each in contenders(paths, "llama.cpp", "/some/python")] == ["unshared.gguf"]
    assert [each.path.name for each in contenders(paths, "torch", "/some/python")][-1] == "unshared.gguf"
    with pytest.raises(UsageError, match="none of the models was made for onnxruntime"):
        contenders(paths[:1], "onnxruntime", None)
    with pytest.raises(UsageError, match="onnxruntime computes on the CPU"):
        contenders(paths[:2], "auto", None, "cuda")
    with pytest.raises(UsageError, match="no such file"):
        contenders([models / "absent"], "auto", None)
    assert found[1].bytes == sum(file.stat().st_size for file in (models / "onnx").glob("model.onnx*"))


def test_turns_give_speed_memory_and_latency_of_each(models):
    entrants = contenders([models / "model", models / "onnx"], "auto", None)
    seen = []
    rows = measure(entrants, Settings((1,), rounds=2, starts=1), lambda stage, done, total: seen.append((done, total)))
    assert [row["engine"] for row in rows] == ["torch", "onnxruntime"]
    assert seen[0] == (0, 4) and seen[-1] == (4, 4)
    for row in rows:
        speed = row["decode_tokens_per_second"]
        assert len(speed["all"]) == 2 and speed["best"] >= speed["median"] > 0
        assert "prefill_64_tokens_per_second" in row and "prefill_512_tokens_per_second" not in row  # a context of 128
        assert 0 < row["load_seconds"] < row["first_token_seconds"]["best"] and row["forward_seconds"] > 0
        memory = row["memory_bytes"]
        assert memory["peak_rss"] >= memory["rss"] > 10 << 20
        assert memory["peak_rss"] >= memory["prompted"] > memory["before_load"] > 10 << 20
        assert row["generate"]["context"] == 128 and row["generate"]["peak_rss"] > 20 << 20
        assert row["bytes_per_second"] == pytest.approx(row["read_bytes_per_token"] * speed["median"])
        assert row["memory_bytes_per_second"] > 1e8
    torch_row, onnx_row = rows
    head, layers = 512 * 64, 3 * 4 * 64 * 64 + 3 * 64 * 96  # attention of three layers, one network
    assert onnx_row["read_bytes_per_token"] == (head * (8 + 16 / 32) + layers * (4 + 16 / 32)) / 8
    assert torch_row["read_bytes_per_token"] == 4 * (head + layers + 7 * 64)


def test_a_process_that_ends_is_told_with_its_last_words(models, tmp_path):
    broken = Contender(tmp_path / "none", "onnxruntime", sys.executable)
    with pytest.raises(MobiLlamaError, match=r"none in onnxruntime: .*no such file"):
        Worker(broken, 1, "cpu")


def test_energy_is_counted_around_decoding_alone(models):
    done = []

    class Watched(Worker):
        def ask(self, do, **more):
            done.append((do, more["tokens"]))
            return super().ask(do, **more)

    class Counter:
        name = "counter"

        def joules(self):
            done.append("read")
            return float(len(done))

    (contender,) = contenders([models / "onnx"], "auto", None)
    taken, worker = {}, Watched(contender, 1, "cpu")
    try:
        _take_turn(worker, taken, [Counter()])
    finally:
        worker.close()
    assert done == [("prefill", 64), ("prefill", 64), "read", ("decode", 63), "read"]
    assert len(taken["step"]) == 63 and taken["joules counter"] == [2 / 63]


def test_a_context_is_chosen_and_one_without_room_is_told(models):
    entrants = contenders([models / "shared.gguf"], "torch", None)
    (row,) = measure(entrants, Settings((1,), rounds=1, starts=1, context=80), lambda *facts: None)
    assert row["generate"]["context"] == 80
    with pytest.raises(UsageError, match=r"shared\.gguf: a context of 65 tokens has no room for a prompt of 64"):
        measure(entrants, Settings((1,), rounds=1, starts=1, context=65), lambda *facts: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(models):
    with pytest.raises(UsageError, match=r"--device: cuda"):
        contenders([models / "model"], "auto", None, "cuda")


def test_threads_are_one_and_all_or_as_wanted():
    assert thread_counts([])[0] == 1
    assert thread_counts([1]) == (1,)
    assert len(thread_counts([], "cuda")) == 1
    with pytest.raises(UsageError, match="cores"):
        thread_counts([100_000])


def test_the_verb_prints_records_and_draws(models, tmp_path):
    words = ["bench", "infer", models / "onnx", "--threads", 1, "--rounds", 1, "--remark", "random weights"]
    done = run_cli(*words, "--out", tmp_path / "b.json", "--picture", tmp_path / "b.png")
    assert done.returncode == 0, done.stderr
    tables = (
        "decode 128",
        "random weights",
        "load adds MiB",
        "and a prompt MiB",
        "generate MiB",
        "The paper's Table 6",
        "63.38",
        "Table 11",
    )
    assert all(said in done.stdout for said in tables)
    assert "at 1 thread)" in done.stderr and "over 128 tokens" in done.stderr
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["remark"] == "random weights" and result["environment"]["date"] and len(result["rows"]) == 1
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    done = run_cli("bench", "infer", models / "onnx", "--llama-python", "/nowhere/python")
    assert done.returncode == 2 and "pip install llama-cpp-python" in done.stderr
