from __future__ import annotations

import json

import pytest

from conftest import run_cli
from mobillama.cli import main
from mobillama.config import to_yaml
from mobillama.data.dataset import Dataset


@pytest.fixture
def prepare_file(prepare_recipe, tmp_path):
    path = tmp_path / "prepare.yaml"
    path.write_text(to_yaml(prepare_recipe), encoding="utf-8")
    return path


def test_a_tokenizer_learns_from_the_sources_of_a_recipe(tmp_path, capsys):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(400)))
    (tmp_path / "notes.jsonl").write_text(json.dumps({"body": "some words of prose " * 50}) + "\n{broken\n")
    code = f"code: {{path: {tmp_path}, format: text, files: '*.py'}}"
    notes = f"notes: {{path: {tmp_path / 'notes.jsonl'}, text_field: body}}"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"{{tokenizer: none, bad_documents: skip, sources: {{{code}, {notes}}}}}")
    assert main(["tokenizer", "train", str(recipe), "--vocab-size", "300", "--out", str(tmp_path / "t.model")]) == 0
    shown = capsys.readouterr().out
    assert "code" in shown and "notes" in shown


def test_files_that_are_not_read_and_dropped_documents_are_told(tokenizer_path, tmp_path):
    (tmp_path / "raw" / "sub").mkdir(parents=True)
    texts = [json.dumps({"text": f"words of document {n} " * 20}) for n in range(40)]
    (tmp_path / "raw" / "sub" / "a.jsonl").write_text("\n".join([*texts, "{broken"]) + "\n")
    (tmp_path / "raw" / "b.csv").touch()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"{{tokenizer: {tokenizer_path}, sources: {{s: {{path: {tmp_path / 'raw'}}}}}, bad_documents: skip, "
        "sequence_length: 33, chunks: 2}"
    )
    done = run_cli("data", "prepare", recipe, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "not read in" in done.stderr and "b.csv" in done.stderr and "a.jsonl" not in done.stderr
    assert "documents dropped: not_json 1" in done.stderr


def test_preparing_on_the_command_line_shows_progress_and_a_table(data, prepare_file, tmp_path):
    words = ("data", "prepare", prepare_file, "--out", tmp_path / "out", "--workers", "2")
    first = run_cli(*words)
    assert first.returncode == 0, first.stderr
    for stage in ("hash raw files", "read and tokenise", "sort sequences", "write chunks"):
        assert stage in first.stderr
    assert "encyclopedia" in first.stdout and "tokens left over" in first.stdout
    assert Dataset(tmp_path / "out").manifest == Dataset(data).manifest
    again = run_cli(*words)
    assert "already prepared from these inputs" in again.stderr
    other = run_cli(*words, "--chunks", "4")
    assert other.returncode == 2 and "prepared with another 'chunks'" in other.stderr


def test_how_and_where_it_was_made_stands_beside_the_manifest(data, prepare_recipe):
    made = json.loads((data / "preparation.json").read_text())
    assert made["executor"] == "local" and made["environment"]["python"]
    assert made["paths"] == {name: source.path for name, source in prepare_recipe.sources.items()}
    assert set(made["seconds"]) >= {"read and tokenise", "sort sequences", "write chunks"}
    assert "preparation.json" not in Dataset(data).manifest["files"]


def test_statistics_add_up_and_are_drawn(data, tmp_path, capsys):
    assert main(["data", "stats", str(data), "--json", "--picture", str(tmp_path / "corpus.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(source["share"] for source in facts["sources"]) == pytest.approx(1)
    assert sum(source["training_sequences"] for source in facts["sources"]) == facts["training_sequences"]
    assert [source["documents"] for source in facts["sources"]] == [30, 30, 30]
    assert (tmp_path / "corpus.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "books" in shown and "Amber's" in shown


def test_the_ledger_has_a_line_for_every_document(data, tmp_path, capsys):
    assert main(["data", "export", str(data), str(tmp_path / "ledger.jsonl"), "--ledger"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(rows) == 90
    assert {row["verdict"] for row in rows} == {"kept"}
    assert [row["line"] for row in rows[:3]] == [1, 2, 3]
    tokens = sum(source["tokens"] for source in Dataset(data).manifest["sources"])
    assert sum(row["tokens"] for row in rows) == tokens


def test_tokenizers_are_trained_and_compared(corpus, tokenizer_path, tmp_path, capsys):
    out = tmp_path / "new.model"
    words = ["tokenizer", "train", str(corpus / "books.jsonl"), str(corpus / "code"), "--vocab-size", "400"]
    assert main([*words, "--out", str(out), "--compare", str(tokenizer_path)]) == 0
    shown = capsys.readouterr().out
    assert "new (400)" in shown and "small (512)" in shown
    rows = {line.split("│")[1].strip(): line.split("│") for line in shown.splitlines() if line.startswith("│")}
    assert set(rows) == {"books.jsonl", "code", "all"}
    assert float(rows["all"][4]) > float(rows["all"][3]) > 1  # 512 ids need fewer tokens than 400
    assert main(["tokenizer", "compare", str(out), "--texts", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_misspelled_options_are_named(data, capsys):
    assert main(["data", "stats", str(data), "--picure", "x"]) == 2
    assert "unknown option '--picure' (did you mean '--picture'?)" in capsys.readouterr().err
    assert main(["data", "prepare", "x.yaml", "--out", "y", "--slurm_time", "1"]) == 2
    assert "did you mean '--slurm-time'?" in capsys.readouterr().err
