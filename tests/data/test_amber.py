from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import lzma
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from conftest import CONTEXT, VOCAB
from mobillama.config import load_recipe
from mobillama.data.amber_export import export_amber
from mobillama.data.amber_import import import_amber
from mobillama.data.dataset import Dataset
from mobillama.data.order import order
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.tokenizer import decode
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.data.trace import trace
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import PretrainRecipe
from mobillama.record.manifest import verify_manifest
from mobillama.train.loop import Silent, pretrain
from mobillama.workflows.inspect import show_step


def quiet(stage: str, done: float, total: float) -> None:
    assert 0 <= done <= total


def export(data: Path, out: Path) -> Path:
    export_amber(Dataset(data), out, quiet)
    return out


def jsonl_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def amber_lines(count: int, length: int = 9, seed: int = 0, vocab: int = VOCAB) -> list[str]:
    """Lines as LLM360's own scripts write them."""
    draw = random.Random(seed)
    return [
        json.dumps(
            {
                "token_ids": [draw.randrange(vocab) for _ in range(length)],
                "source": draw.choice(["c4", "arxiv", "book"]),
            }
        )
        for _ in range(count)
    ]


def amber_folder(folder: Path, files: dict[str, list[str]]) -> Path:
    folder.mkdir()
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory) -> Path:
    return export(data, tmp_path_factory.mktemp("amber") / "exported")


@pytest.fixture(scope="module")
def imported(exported, tokenizer_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("amber") / "imported"
    import_amber(exported, tokenizer_path, out, quiet)
    return out


def assert_same_sequences(one: Dataset, other: Dataset) -> None:
    """All rows, labels, hold-outs, hashes and later epochs are the same."""
    assert one.size == other.size
    rows = np.arange(one.size)
    assert np.array_equal(one.read(rows), other.read(rows))
    names = [[data.source_names[source] for source in data.layout.source_of(rows)] for data in (one, other)]
    assert names[0] == names[1]
    assert [chunk["root"] for chunk in one.manifest["chunks"]] == [chunk["root"] for chunk in other.manifest["chunks"]]
    assert one.root == other.root
    for name in one.source_names:
        held = one.holdout(name)
        assert np.array_equal(held, other.holdout(name) if name in other.source_names else held[:0])
    assert set(other.source_names) <= set(one.source_names)
    second_epoch = [data.rows_of_step(data.prepared_seed, data.size, 1) for data in (one, other)]
    assert np.array_equal(order(one.root, 7, one.size, [one.size]), second_epoch[0])
    assert np.array_equal(order(one.root, 0, one.size, [one.size]), second_epoch[1])


def test_exported_lines_are_the_training_order_as_json_writes_it(data, exported):
    dataset = Dataset(data)
    batch = dataset.batch(dataset.prepared_seed, 0, dataset.size)
    expected = [
        json.dumps({"token_ids": ids, "source": dataset.source_names[source]}) + "\n"
        for ids, source in zip(batch.ids.tolist(), batch.sources.tolist(), strict=True)
    ]
    files = jsonl_files(exported)
    chunks = [files.pop(f"train_{number:03d}.jsonl") for number in range(5)]
    assert b"".join(chunks).decode() == "".join(expected)
    assert [chunk.count(b"\n") for chunk in chunks] == [chunk["rows"] for chunk in dataset.manifest["chunks"]]
    assert files.keys() == {f"holdout_{name}.jsonl" for name in dataset.source_names}
    for name in dataset.source_names:
        held = [json.dumps({"token_ids": ids, "source": name}) + "\n" for ids in dataset.holdout(name).tolist()]
        assert files[f"holdout_{name}.jsonl"].decode() == "".join(held)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (exported / "tokenizer" / file).read_bytes() == (data / "tokenizer" / file).read_bytes()


def test_export_counts_its_sequences_and_overwrites_nothing(data, tmp_path):
    dataset = Dataset(data)
    held = sum(len(dataset.holdout(name)) for name in dataset.source_names)
    assert export_amber(dataset, tmp_path / "out", quiet) == dataset.size + held
    with pytest.raises(UsageError, match="exists already"):
        export(data, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another place"):
        export(data, tmp_path / "file" / "out")


def test_a_damaged_sequence_is_not_exported(data, tmp_path):
    shutil.copytree(data, tmp_path / "copy")
    target = tmp_path / "copy" / "train" / "chunk-00003.npy"
    content = bytearray(target.read_bytes())
    content[-5] ^= 1
    target.write_bytes(content)
    with pytest.raises(CorruptDataError, match=r"chunk-00003\.npy"):
        export(tmp_path / "copy", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_prepared_exported_imported_is_the_same_data_set(data, imported, exported, tmp_path):
    assert_same_sequences(Dataset(data), Dataset(imported))
    verify_manifest(imported, Dataset(imported).manifest)
    assert jsonl_files(export(imported, tmp_path / "again")) == jsonl_files(exported)


def test_weights_and_no_holdout_survive_the_round_trip(prepare_recipe, tokenizer_path, tmp_path):
    sources = {
        name: dataclasses.replace(source, weight=weight)
        for (name, source), weight in zip(prepare_recipe.sources.items(), (2.0, 0.5, 1.0), strict=True)
    }
    prepare(dataclasses.replace(prepare_recipe, sources=sources, holdout=0, chunks=2), tmp_path / "data")
    exported = export(tmp_path / "data", tmp_path / "out")
    assert jsonl_files(exported).keys() == {"train_000.jsonl", "train_001.jsonl"}
    import_amber(exported, tokenizer_path, tmp_path / "in", quiet)
    assert_same_sequences(Dataset(tmp_path / "data"), Dataset(tmp_path / "in"))
    assert jsonl_files(export(tmp_path / "in", tmp_path / "again")) == jsonl_files(exported)


@pytest.mark.parametrize("length", [2, 65, 2049, 4097])
def test_files_as_amber_has_them_come_back_byte_for_byte(tokenizer_path, tmp_path, length):
    lines = amber_lines(23, length)
    files = {"train_000.jsonl": lines[:10], "train_001.jsonl": [], "train_002.jsonl": lines[10:]}
    folder = amber_folder(tmp_path / "amber", files)
    manifest = import_amber(folder, tokenizer_path, tmp_path / "in", quiet)
    dataset = Dataset(tmp_path / "in")
    rows = [json.loads(line) for line in lines]
    assert dataset.sequence_length == length
    assert dataset.read(np.arange(23)).tolist() == [row["token_ids"] for row in rows]
    labels = [dataset.source_names[source] for source in dataset.layout.source_of(np.arange(23))]
    assert labels == [row["source"] for row in rows]
    assert dataset.source_names == list(dict.fromkeys(labels))
    assert [chunk["rows"] for chunk in manifest["chunks"]] == [10, 0, 13]
    assert jsonl_files(export(tmp_path / "in", tmp_path / "again")) == jsonl_files(folder)


def test_compressed_files_give_the_same_data_set(imported, exported, tokenizer_path, tmp_path):
    pack = [gzip.compress, lzma.compress, zstandard.compress, bytes]
    for number, file in enumerate(sorted(exported.glob("*.jsonl"))):
        suffix = (".gz", ".xz", ".zst", "")[number % 4]
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / "packed" / (file.name + suffix)).write_bytes(pack[number % 4](file.read_bytes()))
    packed = import_amber(tmp_path / "packed", tokenizer_path, tmp_path / "in", quiet)
    plain = Dataset(imported).manifest
    for key in ("root", "corpus_root", "sources", "chunks", "holdout", "files"):
        assert packed[key] == plain[key]


def test_chunks_are_numbers_and_other_spellings_are_read(tokenizer_path, tmp_path):
    lines = amber_lines(4)
    spaced = [
        json.dumps(dict(reversed(json.loads(line).items())), indent=None, separators=(" ,", ": ")) for line in lines
    ]
    folder = amber_folder(tmp_path / "amber", {"train_1000.jsonl": spaced[2:], "train_999.jsonl": spaced[:2]})
    (folder / "train_1000.jsonl").write_bytes((folder / "train_1000.jsonl").read_bytes().rstrip(b"\n"))
    import_amber(folder, tokenizer_path, tmp_path / "in", quiet)
    files = jsonl_files(export(tmp_path / "in", tmp_path / "out"))
    assert files == {
        "train_000.jsonl": "".join(f"{line}\n" for line in lines[:2]).encode(),
        "train_001.jsonl": "".join(f"{line}\n" for line in lines[2:]).encode(),
    }


def test_ids_beyond_16_bits_are_kept(tmp_path):
    from tokenizers import Tokenizer, models

    words = {"</s>": 0, **{f"w{number}": number for number in range(1, 70000)}}
    Tokenizer(models.WordLevel(words, unk_token="</s>")).save(str(tmp_path / "tokenizer.json"))
    lines = [*amber_lines(5, vocab=70000), json.dumps({"token_ids": [69999] * 9, "source": "c4"})]
    folder = amber_folder(tmp_path / "amber", {"train_000.jsonl": lines})
    assert import_amber(folder, tmp_path / "tokenizer.json", tmp_path / "in", quiet)["dtype"] == "<u4"
    assert jsonl_files(export(tmp_path / "in", tmp_path / "out")) == jsonl_files(folder)


def test_spans_and_ledger_name_each_line(exported, imported):
    dataset = Dataset(imported)
    lines = {path.name: path.read_bytes().splitlines(keepends=True) for path in exported.glob("*.jsonl")}
    seen = set()
    for row in range(dataset.size):
        (span,) = dataset.spans(row)
        line = lines[span.file][span.line - 1]
        assert (span.start, span.end) == (0, dataset.sequence_length)
        assert hashlib.sha256(line).hexdigest()[:32] == span.digest
        assert json.loads(line)["token_ids"] == dataset.read(np.array([row]))[0].tolist()
        seen.add((span.file, span.line))
    entries = list(dataset.ledger.entries())
    assert {entry.verdict for entry in entries} == {"kept"}
    assert {entry.tokens for entry in entries} == {CONTEXT + 1}
    held = {(entry.file, entry.line) for entry in entries if entry.file.startswith("holdout")}
    assert seen | held == {(name, number + 1) for name, content in lines.items() for number in range(len(content))}
    assert len(entries) == len(seen) + len(held)


def test_layout_leads_from_rows_to_sequences_and_back(imported):
    dataset = Dataset(imported)
    layout = dataset.layout
    sources, sequences = layout.train_origin(np.arange(dataset.size))
    for index, source in enumerate(layout.sources):
        rows = np.flatnonzero(sources == index)
        assert sequences[rows].tolist() == list(range(source.trainable))
        mixed = np.random.default_rng(index).permutation(source.trainable)
        assert np.array_equal(layout.train_rows(index, mixed)[:, 0], rows[mixed])
        held = layout.holdout_sequences(index)
        assert len(held) == source.holdout > 0
        assert (layout.train_rows(index, held) == -1).all()
        index_of, places = layout.destinations(index, 1, source.sequences)
        assert index_of.tolist() == list(range(source.sequences - 1))
        assert places.tolist() == [*rows[1:].tolist(), *range(*layout.holdout_starts[index : index + 2])]
        ids = dataset.holdout(dataset.source_names[index])
        for place, sequence in enumerate(held.tolist()):
            (span,) = dataset.spans_of(index, sequence)
            assert (span.file, span.line) == (f"holdout_{source.name}.jsonl", place + 1)
        assert np.array_equal(dataset.holdout(dataset.source_names[index], 1, 1), ids[1:2])
    backwards = np.arange(dataset.size)[::-1]
    assert np.array_equal(layout.source_of(backwards), sources[::-1])
    for outside in (-1, dataset.size):
        with pytest.raises(IndexError):
            layout.train_origin(outside)


def test_a_text_is_traced_to_its_line_and_rows(imported, tmp_path):
    dataset = Dataset(shutil.copytree(imported, tmp_path / "copy"))  # the index goes beside the data
    text = decode(dataset.tokenizer, dataset.read(np.array([3]))[0].tolist()[5:30])
    hits = trace(dataset, text)
    (span,) = dataset.spans(3)
    assert (span.file, span.line, [3]) in [(hit.file, hit.line, hit.rows) for hit in hits.occurrences]


def test_a_step_is_shown_with_its_lines(imported, capsys):
    show_step(imported, 1, 2, None, 40, False)
    assert "train_000.jsonl:2, sha256" in capsys.readouterr().out


def test_training_reads_an_import_front_to_back_and_needs_no_holdout(recipe_file, tokenizer_path, tmp_path):
    folder = amber_folder(tmp_path / "amber", {"train_000.jsonl": amber_lines(20, CONTEXT + 1)})
    import_amber(folder, tokenizer_path, tmp_path / "in", quiet)
    dataset = Dataset(tmp_path / "in")
    assert [row for step in range(5) for row in dataset.rows_of_step(0, step, 4)] == list(range(20))
    overrides = ["--data", str(tmp_path / "in"), "--seed", "0", "--train.steps", "3", "--train.validate_every", "1"]
    pretrain(load_recipe(PretrainRecipe, recipe_file, overrides), Silent())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["step"] * 3 + ["checkpoint"]
    assert records[0]["loss_by_source"].keys() == set(dataset.source_names)


def test_manifest_counts_and_names_no_machine(imported, exported, data, tokenizer_path, tmp_path):
    manifest, prepared = Dataset(imported).manifest, Dataset(data).manifest
    assert manifest["order"] == "given"
    assert manifest.keys() == prepared.keys() | {"order"}
    assert manifest["inputs"]["seed"] == Dataset(imported).prepared_seed == 0
    for key in ("tokenizer", "tokenizer_file", "vocab_size", "eos_id", "sequence_length", "chunks"):
        assert manifest["inputs"][key] == prepared["inputs"][key]
    text = (imported / "manifest.json").read_text()
    assert str(imported.parent) not in text
    assert str(exported.parent) not in text
    before = {source["name"]: source for source in prepared["sources"]}
    lengths = np.array([len(piece) for piece in Dataset(data).tokenizer.token_bytes])
    for source, given in zip(manifest["sources"], manifest["inputs"]["sources"], strict=True):
        name = source["name"]
        for key in ("sequences", "holdout_sequences", "dealt_sequences"):
            assert source[key] == before[name][key]
        assert source["tokens"] == source["documents"] * (CONTEXT + 1)
        assert [file["name"] for file in given["files"]][-1] == f"holdout_{name}.jsonl"
        for file in given["files"]:
            content = (exported / file["name"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        ids = [json.loads(line) for path in exported.glob("*.jsonl") for line in path.read_text().splitlines()]
        assert source["bytes"] == sum(lengths[row["token_ids"]].sum() for row in ids if row["source"] == name)
    assert import_amber(exported, tokenizer_path, tmp_path / "in", quiet) == manifest
    assert (tmp_path / "in" / "manifest.json").read_text() == text


def test_changed_labels_are_not_used(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "copy")
    target = tmp_path / "copy" / "labels" / "chunk-00001.npy"
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    dataset = Dataset(tmp_path / "copy")
    with pytest.raises(CorruptDataError, match=r"labels/chunk-00001\.npy"):
        dataset.batch(0, 0, dataset.size)


GOOD = '{"token_ids": [1, 2, 3], "source": "c4"}'
BAD_LINES = {
    "not JSON": ('{"token_ids": [1, 2', "not valid JSON"),
    "blank": ("", "not valid JSON"),
    "not UTF-8": ('{"token_ids": [1, 2, 3], "source": "\udce9"}', "not valid JSON"),
    "nested": ("[" * 100000, "not valid JSON"),
    "huge number": ('{"token_ids": [1, 2, ' + "9" * 5000 + '], "source": "c4"}', "not valid JSON"),
    "list": ("[1, 2, 3]", "and nothing else"),
    "no source": ('{"token_ids": [1, 2, 3]}', "and nothing else"),
    "further key": ('{"token_ids": [1, 2, 3], "source": "c4", "x": 1}', "and nothing else"),
    "text": ('{"token_ids": "123", "source": "c4"}', "and nothing else"),
    "no ids": ('{"token_ids": [], "source": "c4"}', "and nothing else"),
    "fraction": ('{"token_ids": [1, 2, 3.0], "source": "c4"}', "and nothing else"),
    "truth": ('{"token_ids": [1, 2, true], "source": "c4"}', "and nothing else"),
    "label": ('{"token_ids": [1, 2, 3], "source": 4}', "and nothing else"),
    "short": ('{"token_ids": [1, 2], "source": "c4"}', "2 ids, the first line has 3"),
    "long": ('{"token_ids": [1, 2, 3, 4], "source": "c4"}', "4 ids, the first line has 3"),
    "unknown id": (f'{{"token_ids": [1, 2, {VOCAB}], "source": "c4"}}', f"ids outside the tokenizer's {VOCAB}"),
    "negative id": ('{"token_ids": [1, 2, -1], "source": "c4"}', "ids outside the tokenizer's"),
    "vast id": (f'{{"token_ids": [1, 2, {1 << 70}], "source": "c4"}}', "ids outside the tokenizer's"),
    "path as label": ('{"token_ids": [1, 2, 3], "source": "../c4"}', "is no name of letters"),
    "empty label": ('{"token_ids": [1, 2, 3], "source": ""}', "is no name of letters"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_named_and_leave_nothing(tokenizer_path, tmp_path, kind):
    line, said = BAD_LINES[kind]
    folder = tmp_path / "amber"
    folder.mkdir()
    (folder / "train_000.jsonl").write_text(f"{GOOD}\n", encoding="utf-8")
    content = f"{GOOD}\n{line}\n{GOOD}\n".encode("utf-8", "surrogateescape")
    (folder / "train_001.jsonl").write_bytes(content)
    with pytest.raises(CorruptDataError) as caught:
        import_amber(folder, tokenizer_path, tmp_path / "in", quiet)
    assert f"{folder}/train_001.jsonl:2: " in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["amber"]


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_damaged_archives_are_named(tokenizer_path, tmp_path, suffix, harm):
    pack = {"gz": lambda raw: gzip.compress(raw, mtime=0), "xz": lzma.compress, "zst": zstandard.compress}[suffix]
    content = bytearray(pack("".join(f"{line}\n" for line in amber_lines(200)).encode()))
    if harm == "truncate":
        del content[-30:]
    else:
        content[3 * len(content) // 4 : 3 * len(content) // 4 + 16] = bytes(16)
    (tmp_path / "amber").mkdir()
    (tmp_path / "amber" / f"train_000.jsonl.{suffix}").write_bytes(content)
    with pytest.raises(CorruptDataError, match=rf"train_000\.jsonl\.{suffix}:\d+: .*fetch"):
        import_amber(tmp_path / "amber", tokenizer_path, tmp_path / "in", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["amber"]


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({}, UsageError, "holds no train_NNN.jsonl"),
        ({"holdout_c4.jsonl": [GOOD]}, UsageError, "holds no train_NNN.jsonl"),
        ({"train_000.jsonl": [], "holdout_c4.jsonl": [GOOD]}, UsageError, "nothing is left to train on"),
        ({"train_000.jsonl": [GOOD], "other.jsonl": [GOOD]}, UsageError, "neither train_NNN.jsonl nor holdout_"),
        ({"train_000.jsonl": [GOOD], "train_00.jsonl": [GOOD]}, UsageError, "the same part as train_00"),
        ({"train_000.jsonl": [GOOD], "train_002.jsonl": [GOOD]}, CorruptDataError, "chunk 1 is not there"),
        ({"train_000.jsonl": [GOOD.replace("1, 2, 3", "1")]}, CorruptDataError, "train_000.jsonl:1: a sequence of one"),
        ({"train_000.jsonl": [GOOD], "holdout_x.jsonl": [GOOD]}, CorruptDataError, "holdout_x.jsonl:1: source 'c4'"),
        (
            {"train_000.jsonl": [GOOD.replace("c4", f"s{number}") for number in range(256)]},
            CorruptDataError,
            "train_000.jsonl:256: source 's255' is one more than 255",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_folders_that_are_no_data_set_are_refused(tokenizer_path, tmp_path, files, error, said):
    with pytest.raises(error) as caught:
        import_amber(amber_folder(tmp_path / "amber", files), tokenizer_path, tmp_path / "in", quiet)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["amber"]


@pytest.mark.parametrize("now", [1, 3])
def test_a_file_that_changes_meanwhile_is_named(tokenizer_path, tmp_path, now):
    folder = amber_folder(tmp_path / "amber", {"train_000.jsonl": [GOOD], "train_001.jsonl": [GOOD] * 2})

    def meddle(stage: str, done: float, total: float) -> None:
        if stage == "import":
            (folder / "train_001.jsonl").write_text(f"{GOOD}\n" * now)

    with pytest.raises(CorruptDataError, match=r"train_001\.jsonl: changed while it was read"):
        import_amber(folder, tokenizer_path, tmp_path / "in", meddle)
    assert not (tmp_path / "in").exists()


def test_wrong_places_are_refused(exported, imported, tokenizer_path, tmp_path):
    with pytest.raises(UsageError, match="is no directory"):
        import_amber(exported / "train_000.jsonl", tokenizer_path, tmp_path / "in", quiet)
    with pytest.raises(UsageError, match="no tokenizer there"):
        import_amber(exported, tmp_path / "absent.model", tmp_path / "in", quiet)
    with pytest.raises(UsageError, match="exists already"):
        import_amber(exported, tokenizer_path, imported, quiet)
    train_tokenizer(iter(["other words " * 50, "of another tokenizer " * 50]), 300, tmp_path / "other.model")
    with pytest.raises(UsageError, match=r"other.model is not the one that made .*; use .*tokenizer"):
        import_amber(exported, tmp_path / "other.model", tmp_path / "in", quiet)


def test_a_source_may_be_only_trained_on_or_only_held_out(tokenizer_path, tmp_path):
    files = {
        "holdout_book.jsonl": [GOOD.replace("c4", "book")] * 2,
        "holdout_none.jsonl": [],
        "train_000.jsonl": [GOOD],
    }
    folder = amber_folder(tmp_path / "amber", files)
    manifest = import_amber(folder, tokenizer_path, tmp_path / "in", quiet)
    dataset = Dataset(tmp_path / "in")
    assert dataset.source_names == ["c4", "book"]
    assert [entry["rows"] for entry in manifest["holdout"]] == [0, 2]
    assert dataset.holdout("c4").shape == (0, 3)
    assert dataset.layout.train_rows(1, [0, 1]).tolist() == [[-1], [-1]]
