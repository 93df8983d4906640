"""The command line as users meet it: help, exit codes, one-line errors, nothing harmed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from conftest import CONTEXT, VOCAB, run_cli
from mobillama.cli import main
from mobillama.data.tokenizer import load_tokenizer
from mobillama.directory import save_model
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig


@pytest.fixture
def model(tokenizer_path, tmp_path):
    config = ModelConfig(VOCAB, 32, 48, 2, 2, max_position_embeddings=CONTEXT)
    built = MobiLlama(config)
    initialise(built, config, 0)
    save_model(tmp_path / "model", config, built.state_dict(), load_tokenizer(tokenizer_path))
    return tmp_path / "model"


def test_help_that_nobody_reads_to_its_end_is_no_failure():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mobillama", "sft", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def assert_one_line_error(done, code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mobillama: ")
    for text in said:
        assert text in last


def test_help_of_every_verb_teaches(capsys):
    for words in (
        [],
        ["presets"],
        ["data"],
        ["data", "prepare"],
        ["data", "show"],
        ["pretrain"],
        ["import"],
        ["export", "gguf"],
        ["compress", "quantize"],
        ["export", "onnx"],
        ["bench"],
        ["bench", "infer"],
        ["generate"],
        ["chat"],
        ["evaluate"],
        ["table"],
    ):
        with pytest.raises(SystemExit) as left:
            main([*words, "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert "usage: mobillama" in shown
    main_help = run_cli("--help").stdout
    assert "quickstart" in main_help and "75 stopped, run me again" in main_help
    assert "--optimizer.learning_rate" in run_cli("pretrain", "--help").stdout
    assert "The sources by name" in run_cli("data", "prepare", "--help").stdout


def test_nothing_is_made_without_a_name_or_over_a_file(data, tokenizer_path, tmp_path):
    for words in (["prepare", "r.yaml", "--out", "."], ["export", data, "/"], ["stats", data, "--picture", ""]):
        done = run_cli("data", *words)
        assert done.returncode == 2 and "is no name for a new file or directory" in done.stderr
    victim = tmp_path / "victim.jsonl"
    victim.write_text('{"text": "precious"}\n')
    assert_one_line_error(run_cli("data", "export", data, victim, "--ledger"), 2, "victim.jsonl: exists already")
    done = run_cli("tokenizer", "train", victim, "--vocab-size", 300, "--out", victim)
    assert_one_line_error(done, 2, "victim.jsonl: exists already")
    assert victim.read_text() == '{"text": "precious"}\n'
    for words in (["data", "verify", data, "--deep", "-1"], ["tokenizer", "train", victim, "--vocab-size", "-5"]):
        done = run_cli(*words, *(["--out", tmp_path / "t.model"] if words[0] == "tokenizer" else []))
        assert done.returncode == 2 and "is no whole number from" in done.stderr


def test_presets_as_json_state_the_exact_counts(capsys):
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mobillama-0.5b"]["stored_parameters"] == 534_865_920
    assert rows["mobillama-0.5b"]["applied_parameters"] == 1_261_529_088
    assert rows["baseline3"]["stored_parameters"] == 182_458_368


def test_print_config_is_a_recipe_that_means_the_same(recipe_file, tmp_path):
    shown = run_cli("pretrain", recipe_file, "--train.steps", "3", "--print-config").stdout
    (tmp_path / "resolved.yaml").write_text(shown)
    assert run_cli("pretrain", tmp_path / "resolved.yaml", "--print-config").stdout == shown
    assert "steps: 3" in shown


def test_bad_recipes_exit_2(recipe_file, tmp_path):
    assert_one_line_error(run_cli("pretrain", recipe_file, "--train.stps", "3"), 2, "did you mean 'train.steps'")
    assert_one_line_error(run_cli("pretrain", tmp_path / "absent.yaml"), 2, "absent.yaml: no such recipe")
    assert_one_line_error(
        run_cli("pretrain", recipe_file, "--data", tmp_path / "no"), 2, "make it with 'mobillama data prepare"
    )
    assert_one_line_error(run_cli("pretrain", recipe_file, "--model.vocab_size", 99), 2, "set model.vocab_size to 512")
    assert not (tmp_path / "run").exists()


def test_paths_that_cannot_be_used_exit_2(recipe_file, model, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line_error(run_cli("pretrain", recipe_file, "--run", tmp_path / "file"), 2, "file")
    assert_one_line_error(run_cli("quickstart", "--run", tmp_path / "file"), 2, "file")
    assert_one_line_error(run_cli("export", "hf", model, tmp_path / "file" / "x"), 2, "file")


def test_corrupt_training_data_exits_4_before_it_is_used(recipe_file, data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / "copy")
    chunk = tmp_path / "copy" / "train" / "chunk-00000.npy"
    content = bytearray(chunk.read_bytes())
    content[200] ^= 1
    chunk.write_bytes(content)
    done = run_cli("pretrain", recipe_file, "--data", tmp_path / "copy")
    assert_one_line_error(done, 4, "chunk-00000.npy: sequence 0 differs from what was prepared")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_tokenizer_prepare_and_show(corpus, tmp_path):
    done = run_cli("tokenizer", "train", corpus, "--vocab-size", 400, "--out", tmp_path / "t" / "t.model")
    assert done.returncode == 0, done.stderr
    recipe = tmp_path / "prepare.yaml"
    recipe.write_text(
        f"sources: {{books: {{path: {corpus / 'books.jsonl'}}}}}\ntokenizer: {tmp_path / 't' / 't.model'}\n"
        "sequence_length: 33\nchunks: 2\n"
    )
    prepared = run_cli("data", "prepare", recipe, "--out", tmp_path / "d", "--holdout", "3")
    assert prepared.returncode == 0, prepared.stderr
    assert "books" in prepared.stdout
    shown = run_cli("data", "show", tmp_path / "d", "--step", 2, "--batch-size", 3, "--json")
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [row["row"] for row in rows] == [3, 4, 5]
    assert all(len(row["ids"]) == 33 and row["source"] == "books" and row["documents"] for row in rows)
    people = run_cli("data", "show", tmp_path / "d", "--step", 2, "--batch-size", 3).stdout
    assert "books.jsonl:" in people and rows[0]["text"][:40].splitlines()[0] in people
    assert_one_line_error(run_cli("data", "show", tmp_path / "d", "--step", 2), 2, "--batch-size")
    assert_one_line_error(run_cli("data", "show", tmp_path / "d", "--step", 0, "--batch-size", 1), 2, "counted from 1")
    assert_one_line_error(run_cli("data", "prepare", recipe, "--out", tmp_path / "d"), 2, "another 'holdout'")


def test_show_of_a_run_is_what_the_step_learned_from(recipe_file, data, tmp_path):
    from mobillama.data.dataset import Dataset

    assert run_cli("pretrain", recipe_file, "--train.steps", 3).returncode == 0
    shown = run_cli("data", "show", tmp_path / "run", "--step", 3, "--json")
    rows = [json.loads(line)["row"] for line in shown.stdout.splitlines()]
    assert rows == Dataset(data).rows_of_step(7, 2, 8).tolist()


def test_generate_chat_evaluate_and_export(model, data, tmp_path):
    words = ["generate", model, "--prompt", "The ship", "--max-tokens", 12, "--seed", 5]
    first = run_cli(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The ship") and len(first.stdout) > 12
    assert run_cli(*words).stdout == first.stdout
    assert_one_line_error(run_cli("generate", model, "--prompt", ""), 2, "--prompt: is empty")
    assert_one_line_error(run_cli("generate", model, "--prompt", "word " * 200), 2, "leave no room")
    assert_one_line_error(run_cli("generate", tmp_path / "no", "--prompt", "a"), 2, "no such file or directory")
    assert_one_line_error(run_cli("chat", model, "--temperature", "-1"), 2, "temperature")
    assert_one_line_error(run_cli("generate", model, "--prompt", "a", "--seed", "-1"), 2, "--seed")
    assert (
        run_cli(
            "generate", model, "--prompt", b"\xff\xfe".decode("utf-8", "surrogateescape"), "--max-tokens", 1
        ).returncode
        == 0
    )
    assert run_cli("chat", model).returncode == 0
    words = ["evaluate", model, "--suite", "perplexity", "--data", data, "--out", tmp_path / "evals"]
    found = json.loads(run_cli(*words, "--baselines", "--json").stdout)
    assert 3 < found["results"][0]["holdout"]["bits_per_byte"] < 6 and len(found["baselines"]) == 4
    parity = json.loads(run_cli("export", "hf", model, tmp_path / "twin", "--unshared").stdout)["parity"]
    assert parity["max_logit_error"] < 1e-4 and parity["top1_agreement"] == 1
    assert_one_line_error(run_cli("export", "hf", model, tmp_path / "twin"), 2, "exists")
    done = run_cli("export", "gguf", model, tmp_path / "m.gguf", "--type", "q8_0")
    assert "same likeliest token" in done.stderr and "Q8_0" in json.loads(done.stdout)["types"]
    assert_one_line_error(run_cli("export", "gguf", model, tmp_path / "m.gguf"), 2, "exists")
    nowhere = run_cli("export", "gguf", model, tmp_path / "no" / "m.gguf")
    assert nowhere.returncode == 2 and f"{tmp_path / 'no'}: no such directory; make it first" in nowhere.stderr


def test_changed_weights_exit_4_and_wrong_words_exit_2(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert_one_line_error(run_cli("generate", model, "--prompt", "a"), 4, "model.safetensors: damaged or truncated")
    assert run_cli("generate", model).returncode == 2
    assert run_cli("nonsense").returncode == 2
    assert run_cli("presets", "--jsn").returncode == 2


def test_an_error_is_one_line_though_libraries_were_imported_that_warn(tmp_path):
    pytest.importorskip("torchao")
    done = run_cli("evaluate", str(tmp_path / "none"), "--suite", "quick")
    said = f"mobillama: {tmp_path / 'none'}: no such directory; name a model directory or a repository of the hub"
    assert (done.returncode, done.stderr.splitlines()) == (2, [said])
