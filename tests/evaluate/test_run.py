"""A suite from benchmarks on disk to records: equal to the harness, once, whatever breaks on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import run_cli, shared_data
from mobillama.cli import main
from mobillama.deploy.gguf import export_gguf
from mobillama.engine.blocks import TYPES
from mobillama.errors import CorruptDataError, UsageError
from mobillama.evaluate.model import find_model
from mobillama.evaluate.requests import SEED, load_tasks
from mobillama.evaluate.results import read_result
from mobillama.evaluate.run import Evaluator, record_failure
from mobillama.evaluate.samples import open_samples
from mobillama.evaluate.scorer import Scorer
from mobillama.evaluate.scores import score_benchmark
from mobillama.evaluate.suites import SUITES, find_suite
from mobillama.record.files import sha256_file

SMALL = replace(
    SUITES["paper"], benchmarks=tuple(b for b in SUITES["paper"].benchmarks if b.name in ("SIQA", "WinoGrande"))
)


def quiet(*told) -> None:
    pass


@pytest.fixture
def evaluator(benchmarks, tmp_path):
    def make(suite=SMALL, limit=0, folder=benchmarks) -> Evaluator:
        return Evaluator(suite, folder, tmp_path / "cache", limit, "cpu", "float32", None, quiet)

    return make


def test_scores_and_samples_equal_the_harness(evaluator, small_model, benchmarks, tmp_path):
    ours = evaluator().evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "out", {})
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    stock = HFLM(
        AutoModelForCausalLM.from_pretrained(small_model),
        tokenizer=tokenizer,
        add_bos_token=False,
        prefix_token_id=tokenizer.eos_token_id,
        batch_size=4,
        device="cpu",
    )
    tasks = {task.name: task.task for task in load_tasks(SMALL, benchmarks, tmp_path / "other", 0, quiet)}
    for task in tasks.values():
        task.set_fewshot_seed(SEED)
    theirs = evaluate(stock, tasks, bootstrap_iters=2)
    answers = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()[1:]]
    assert len(answers) == 24
    for answer in answers:
        (sample,) = [s for s in theirs["samples"][answer["task"]] if s["doc_id"] == answer["document"]]
        logprobs, greedy = zip(*(response[0] for response in sample["resps"]), strict=True)
        assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert tuple(answer["greedy"]) == greedy
    for name, metric in (("social_iqa", "acc_norm"), ("winogrande", "acc")):
        found, expected = ours["tasks"][name]["metrics"][metric], theirs["results"][name]
        assert found["value"] == expected[f"{metric},none"]
        assert found["stderr"] == pytest.approx(expected[f"{metric}_stderr,none"])
    assert ours["benchmarks"]["SIQA"]["score"] == 100 * theirs["results"]["social_iqa"]["acc_norm,none"]
    assert ours["packed"] and ours["model"]["sha256"]["model.safetensors"]


def test_questions_without_a_likeliest_choice_are_counted_and_told(
    benchmarks, small_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MOBILLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mobillama.workflows.evaluation.find_suite", lambda name: SMALL)
    flat = tmp_path / "flat"
    shutil.copytree(small_model, flat)
    weights = load_file(flat / "model.safetensors")
    weights["model.norm.weight"].zero_()  # every token is as likely as any other
    save_file(weights, flat / "model.safetensors")
    words = ["--suite", "paper", "--benchmarks", str(benchmarks), "--out", str(tmp_path / "evals")]
    assert main(["evaluate", str(flat), *words]) == 0
    (directory,) = (tmp_path / "evals" / "paper").iterdir()
    result = read_result(directory)
    answers = [json.loads(line)["logprobs"] for line in (directory / "samples.jsonl").read_text().splitlines()[1:]]
    tied = sum(logprobs.count(max(logprobs)) > 1 for logprobs in answers)
    assert tied > 5 and tied == sum(facts["ties"] for facts in result["benchmarks"].values())
    assert f"{tied} questions have no single likeliest choice" in capsys.readouterr().err


def test_what_is_done_is_not_done_again_and_caches_serve_the_next_model(evaluator, small_model, tmp_path):
    first = evaluator().evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "out", {})
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-*.[np]*")}
    assert len(made) == 4  # requests and tokens of two tasks
    assert evaluator().evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "out", {}) == first
    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / "model.safetensors")
    second = evaluator().evaluate(find_model(str(other), tmp_path / "cache"), tmp_path / "out", {})
    assert second["key"]["model"] != first["key"]["model"] and second["tasks"] != first["tasks"]
    assert made == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-*.[np]*")}
    for path in (tmp_path / "cache").glob("*-*.[np]*"):  # cut short: made again
        path.write_bytes(path.read_bytes()[:100])
    again = evaluator().evaluate(find_model(str(other), tmp_path / "cache"), tmp_path / "new", {})
    assert again["tasks"] == second["tasks"]


def test_questions_of_another_number_or_content_are_other_requests(evaluator, benchmarks, tmp_path):
    digests = [task.digest for task in evaluator().tasks]
    assert [task.digest for task in evaluator().tasks] == digests
    assert all(a != b for a, b in zip(digests, [task.digest for task in evaluator(limit=5).tasks], strict=True))
    changed = tmp_path / "changed"
    shutil.copytree(benchmarks, changed)
    place = changed / "lighteval" / "siqa" / "default"
    shutil.copy(place / "train.parquet", place / "validation.parquet")
    assert [a == b for a, b in zip(digests, [t.digest for t in evaluator(folder=changed).tasks], strict=True)] == [
        task.name != "social_iqa" for task in evaluator().tasks
    ]


def test_a_gguf_file_is_evaluated_as_the_model_it_was_made_of(evaluator, small_model, tmp_path, monkeypatch):
    export_gguf(small_model, tmp_path / "small.gguf", TYPES["f32"], tokens=64)
    files = find_model(str(tmp_path / "small.gguf"), tmp_path / "cache")
    assert files.sha256["model.gguf"] == sha256_file(tmp_path / "small.gguf") and len(files.sha256) > 1
    assert find_model(str(tmp_path / "small.gguf"), tmp_path / "cache") == files
    shutil.copy(tmp_path / "small.gguf", tmp_path / "renamed.gguf")
    assert find_model(str(tmp_path / "renamed.gguf"), tmp_path / "cache").digest == files.digest
    with ThreadPoolExecutor() as pool:  # two at once
        for found in pool.map(lambda _: find_model(str(tmp_path / "small.gguf"), tmp_path / "new"), range(2)):
            assert found.digest == files.digest
    with monkeypatch.context() as patch:  # another version reads the file anew
        patch.setattr("mobillama.evaluate.model.VERSION", 99)
        assert find_model(str(tmp_path / "small.gguf"), tmp_path / "cache").directory != files.directory
    of_file = evaluator().evaluate(files, tmp_path / "file", {})
    whole = evaluator().evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "whole", {})
    assert of_file["tasks"] == whole["tasks"] and of_file["key"]["model"] != whole["key"]["model"]
    (tmp_path / "other.gguf").write_bytes((tmp_path / "small.gguf").read_bytes()[:-999])
    with pytest.raises(CorruptDataError, match="behind the file"):
        find_model(str(tmp_path / "other.gguf"), tmp_path / "cache")


def test_a_half_written_result_does_not_count(evaluator, small_model, tmp_path):
    first = evaluator().evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "out", {})
    for file in ("result.json", "samples.jsonl"):
        path = tmp_path / "out" / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_result(tmp_path / "out") is None
    again = evaluator().evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "out", {})
    assert again["tasks"] == first["tasks"]
    assert 0 < again["sequences_scored"] < first["sequences_scored"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-40])])
def test_a_result_whose_samples_are_damaged_does_not_count(evaluator, small_model, tmp_path, damage):
    files, out = find_model(str(small_model), tmp_path / "cache"), tmp_path / "out"
    first = evaluator().evaluate(files, out, {})
    damage(out / "samples.jsonl")
    again = evaluator().evaluate(files, out, {})
    assert again["samples"] == first["samples"] and again["tasks"] == first["tasks"]
    assert sha256_file(out / "samples.jsonl") == first["samples"]["sha256"]


def test_a_result_never_stands_beside_the_samples_of_another_evaluation(evaluator, small_model, tmp_path, monkeypatch):
    files, out = find_model(str(small_model), tmp_path / "cache"), tmp_path / "out"
    first = evaluator().evaluate(files, out, {})
    samples = (out / "samples.jsonl").read_bytes()

    def killed(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_answer", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluator(limit=2).evaluate(files, out, {})
    assert not (out / "result.json").exists() and len((out / "samples.jsonl").read_text().splitlines()) == 1
    (earlier,) = out.glob("earlier-*")
    assert read_result(earlier) == first and (earlier / "samples.jsonl").read_bytes() == samples
    second = evaluator(limit=2).evaluate(files, out, {})
    assert record_failure(out, "gone", {}, UsageError("gone"))["status"] == "failed"
    assert second in [read_result(place) for place in out.glob("earlier-*")]


@pytest.mark.parametrize("fault", ["nan", "missing", "cut", "mute"])
def test_broken_models_are_marked_failed(evaluator, small_model, tmp_path, fault):
    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    path = broken / "model.safetensors"
    weights = load_file(path)
    if fault == "nan":
        weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    elif fault == "missing":
        del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, path)
    if fault == "mute":
        tokenizer = json.loads((broken / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
        (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    result = evaluator().evaluate(find_model(str(broken), tmp_path / "cache"), tmp_path / "out", {})
    assert result["status"] == "failed" and read_result(tmp_path / "out") == result
    said, code = {
        "nan": (f"{broken}: gives logits that are not finite; evaluate an earlier checkpoint", 5),
        "missing": ("q_proj", 4),
        "cut": ("damaged", 4),
        "mute": (f"{broken / 'tokenizer.json'}: turns ", 2),
    }[fault]
    assert said in result["error"] and result["exit_code"] == code


def test_a_model_without_numbers_says_nothing_of_its_architecture(evaluator, small_model, tmp_path):
    shutil.copytree(small_model, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    save_file(
        {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()},
        tmp_path / "nan" / "model.safetensors",
    )
    one = evaluator()
    found = [find_model(str(place), tmp_path / "cache") for place in (tmp_path / "nan", small_model)]
    results = [one.evaluate(files, tmp_path / str(number), {}) for number, files in enumerate(found)]
    assert [result["status"] for result in results] == ["failed", "done"] and results[1]["packed"]


def test_masks_are_tried_once_an_architecture_and_not_where_nothing_is_shared(
    evaluator, small_model, tmp_path, monkeypatch
):
    tried = []
    probe = Scorer._heeds_mask_and_positions
    monkeypatch.setattr(Scorer, "_heeds_mask_and_positions", lambda *told: tried.append(told) or probe(*told))
    files, one = find_model(str(small_model), tmp_path / "cache"), evaluator()
    results = [one.evaluate(files, tmp_path / name, {}) for name in ("a", "b")]
    assert [result["packed"] for result in results] == [True, True] and len(tried) == 1
    assert evaluator(SUITES["perplexity"]).evaluate(files, tmp_path / "c", {})["packed"] is None and len(tried) == 1


@pytest.mark.parametrize("damage", [b"\0" * 60 + b"\n", b"\xff\xfe\n", b"[]\n", b'{"task": "siqa"}\n'])
def test_a_damaged_line_ends_what_counts_of_the_samples(tmp_path, damage):
    with open_samples(tmp_path, {"suite": "s"}) as samples:
        for document in range(3):
            samples.add("siqa", document, [-1.0, -2.0], [True, False])
    lines = (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    with open_samples(tmp_path, {"suite": "s"}) as samples:
        assert list(samples.answers) == [("siqa", 0)]
        samples.add("siqa", 1, [-1.0, -2.0], [True, False])
    assert (tmp_path / "samples.jsonl").read_bytes() == b"".join(lines[:3])


def test_all_missing_data_are_named_at_once(evaluator, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="empty: lacks lighteval/siqa, allenai/winogrande; copy"):
        _ = evaluator(folder=empty).tasks
    with pytest.raises(UsageError, match=r"empty: lacks wikitext2/wiki.test.raw, lambada/lambada_openai.jsonl; "):
        _ = evaluator(SUITES["perplexity"], folder=empty).tasks
    with pytest.raises(UsageError, match="did you mean 'paper'"):
        find_suite("papr")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("wikitext2/wiki.test.raw", b"", "wiki.test.raw: holds no article"),
        ("wikitext2/wiki.test.raw", b"\xff", "wiki.test.raw: 'utf-8' codec"),
        ("lambada/lambada_openai.jsonl", b"", "lambada_openai.jsonl: is empty"),
        ("lambada/lambada_openai.jsonl", b'{"context": "a", "continuation": "b"}\n{"con', "openai.jsonl: line 2 is no"),
        ("lambada/lambada_openai.jsonl", b'{"text": "a"}\n', "lambada_openai.jsonl: line 1 is no"),
    ],
)
def test_damaged_plain_files_are_named_with_the_line(evaluator, benchmarks, tmp_path, file, content, said):
    folder = tmp_path / "benchmarks"
    shutil.copytree(benchmarks, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        _ = evaluator(SUITES["perplexity"], folder=folder).tasks


def test_only_files_at_the_top_of_a_repository_are_fetched(tmp_path, monkeypatch):
    def download(name, revision, allow_patterns, ignore_patterns):
        files = ["config.json", "model.safetensors", "onnx/config.json", "original/model.safetensors"]
        chosen.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return tmp_path

    chosen: list[str] = []
    monkeypatch.setattr("mobillama.evaluate.model.snapshot_download", download)
    with pytest.raises(UsageError, match="holds no weights"):
        find_model("org/name", tmp_path / "cache")
    assert chosen == ["config.json", "model.safetensors"]


def test_killed_and_started_again_it_goes_on(benchmarks, small_model, tmp_path):
    words = ["evaluate", small_model, "--suite", "perplexity", "--benchmarks", benchmarks, "--json", "--device", "cpu"]
    words += ["--precision", "float32"]
    environment = {**os.environ, "MOBILLAMA_CACHE": str(tmp_path / "cache")}
    whole = json.loads(run_cli(*words, "--out", tmp_path / "whole", env=environment).stdout)["results"][0]
    command = [sys.executable, Path(__file__).parent / "scripts" / "slow_evaluation.py"]
    process = subprocess.Popen([*command, *map(str, words), "--out", str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list((tmp_path / "killed").rglob("samples.jsonl"))
        if files and len(files[0].read_text().splitlines()) > 10:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list((tmp_path / "killed").rglob("result.json"))
    done = run_cli(*words, "--out", tmp_path / "killed", env=environment)
    result = json.loads(done.stdout)["results"][0]
    assert 0 < result["sequences_scored"] < whole["sequences_scored"]
    assert result["benchmarks"]["LAMBADA"]["score"] == whole["benchmarks"]["LAMBADA"]["score"]
    bits = [r["benchmarks"]["WikiText-2"]["score"] for r in (result, whole)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6) and 2 < bits[0] < 9
    lambada = [json.loads(line) for line in (benchmarks / "lambada" / "lambada_openai.jsonl").read_text().splitlines()]
    texts = [f"{document['context']} {document['continuation']}" for document in lambada]
    (samples,) = (tmp_path / "whole").rglob("samples.jsonl")
    answers = [json.loads(line) for line in samples.read_text().splitlines()[1:]]
    nats = -sum(answer["logprobs"][0] for answer in answers if answer["task"] == "lambada_openai_text")
    size = sum(len(text.encode()) for text in texts)
    assert whole["benchmarks"]["LAMBADA, text"]["score"] == pytest.approx(nats / size / math.log(2), rel=1e-6)


def test_all_nine_run_offline_in_the_papers_protocol(small_model, tmp_path):
    folder = shared_data() / "benchmarks"
    evaluator = Evaluator(SUITES["quick"], folder, tmp_path / "cache", 1, "cpu", "float32", None, quiet)
    result = evaluator.evaluate(find_model(str(small_model), tmp_path / "cache"), tmp_path / "out", {})
    assert result["status"] == "done", result
    assert [facts["tasks"] for facts in result["benchmarks"].values()] == [1, 1, 57, 1, 10, 1, 1, 1, 1]
    assert len(result["tasks"]) == 74 and result["truncated"]["contexts"] > 0
    assert result["benchmarks"]["TruthfulQA"]["metric"] == "mc2"
    shots = {name: facts["shots"] for name, facts in result["benchmarks"].items() if facts["shots"]}
    assert shots == {"HellaSwag": 10, "MMLU": 5, "ARC-C": 25, "WinoGrande": 5}
    tasks = {task.name: task for task in evaluator.tasks}
    assert tasks["social_iqa"].requests.contexts[0].endswith("\nAnswer: ")
    assert tasks["mmlu_anatomy"].requests.contexts[0].count("Answer:") == 6
    assert tasks["hellaswag"].requests.contexts[0].count("\n\n") == 10


def test_todays_protocol_has_no_examples_and_the_tokenizers_bos(small_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(small_model, directory)
    file = directory / "tokenizer.json"
    stated, bos = json.loads(file.read_text()), AutoTokenizer.from_pretrained(small_model).bos_token
    one = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [one, {"Sequence": {"id": "A", "type_id": 0}}]
    number = AutoTokenizer.from_pretrained(small_model).bos_token_id
    stated["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, one, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    file.write_text(json.dumps(stated))
    nine = tuple(
        replace(b, files=("mmlu/default/mmlu_anatomy",)) if b.name == "MMLU" else b for b in SUITES["today"].benchmarks
    )
    today, folder = replace(SUITES["today"], benchmarks=nine), shared_data() / "benchmarks"
    evaluator = Evaluator(today, folder, tmp_path / "cache", 2, "cpu", "float32", None, quiet)
    result = evaluator.evaluate(find_model(str(directory), tmp_path / "cache"), tmp_path / "out", {})
    assert result["status"] == "done", result
    assert [(facts["shots"], facts["tasks"]) for facts in result["benchmarks"].values()] == [(0, 1)] * 9
    (encoded,) = evaluator._tokens.values()
    assert all(tokens.context_ids[0] == number for tokens in encoded)
    (siqa,) = (task for task in evaluator.tasks if task.benchmark.name == "SIQA")
    assert siqa.requests.contexts[0].startswith("Q: ")


def test_mmlu_is_pooled_today_and_a_mean_of_subjects_in_the_paper():
    subjects = [
        {"questions": n, "ties": 1, "metrics": {"acc": {"value": v, "stderr": 0.1}}} for n, v in ((3, 1.0), (1, 0.0))
    ]
    scores = {}
    for suite in ("today", "paper"):
        (mmlu,) = (benchmark for benchmark in SUITES[suite].benchmarks if benchmark.name == "MMLU")
        scores[suite] = score_benchmark(mmlu, subjects)["score"]
    assert scores == {"today": 75.0, "paper": 50.0}
