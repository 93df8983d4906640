from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import VOCAB
from mobillama.data.dataset import Dataset
from mobillama.data.documents import Piece, Reading, read_piece, read_texts, source_files
from mobillama.data.prepare import pipeline
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.prepare.read import Read
from mobillama.data.tokenizer import id_type, load_tokenizer
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import SourceConfig
from mobillama.record.lock import locked
from mobillama.record.manifest import verify_manifest


def raw_documents(source, name):
    for number, file in enumerate(source_files(source, name)):
        yield from read_piece(Piece(str(file), number), Reading())


def streams(recipe) -> dict[str, np.ndarray]:
    """Each source's ids by the plainest code: encode, append the end mark, concatenate."""
    tokenizer = load_tokenizer(Path(recipe.tokenizer))
    out = {}
    for name, source in recipe.sources.items():
        ids: list[int] = []
        for document in raw_documents(source, name):
            ids += tokenizer.encode([document.text])[0] + [tokenizer.eos_id]
        out[name] = np.array(ids)
    return out


def test_every_sequence_is_trained_or_held_out_exactly_once(data, prepare_recipe):
    dataset, length = Dataset(data), prepare_recipe.sequence_length
    expected = []
    for name, ids in streams(prepare_recipe).items():
        cut = ids[: len(ids) // length * length].reshape(-1, length)
        expected += [(name, tuple(row)) for row in cut.tolist()]
    stored = dataset.batch(dataset.prepared_seed, 0, dataset.size)
    found = [(dataset.source_names[s], tuple(row)) for s, row in zip(stored.sources, stored.ids.tolist(), strict=True)]
    found += [(name, tuple(row)) for name in dataset.source_names for row in dataset.holdout(name).tolist()]
    assert sorted(found) == sorted(expected)
    for source in dataset.manifest["sources"]:
        assert source["holdout_sequences"] == max(1, round(0.05 * source["sequences"]))
        assert source["tokens"] == source["sequences"] * length + source["dropped_tokens"]


def test_spans_lead_back_to_the_raw_documents(data, prepare_recipe):
    dataset = Dataset(data)
    raw = {}
    for name, source in prepare_recipe.sources.items():
        files = source_files(source, name)
        for document in raw_documents(source, name):
            raw[name, files[document.file].name, document.line] = document
    tokenizer = dataset.tokenizer
    for row in range(0, dataset.size, 3):
        (ids,) = dataset.read(np.array([row]))
        (source,), (sequence,) = dataset.layout.train_origin([row])
        name = dataset.source_names[source]
        assert dataset.layout.train_rows(int(source), sequence).tolist() == [[row]]
        spans = dataset.spans(row)
        assert spans[0].start == 0
        assert spans[-1].end == dataset.sequence_length
        for before, span in zip([None, *spans], spans, strict=False):
            assert before is None or before.end == span.start
            document = raw[name, span.file, span.line]
            assert hashlib.sha256(document.raw).hexdigest().startswith(span.digest)
            encoded = [*tokenizer.encode([document.text])[0], tokenizer.eos_id]
            piece = ids[span.start : span.end].tolist()
            if span.start > 0:
                assert encoded[: len(piece)] == piece
            elif span.end < dataset.sequence_length:
                assert encoded[-len(piece) :] == piece
            else:
                assert any(encoded[i : i + len(piece)] == piece for i in range(len(encoded)))


def test_held_out_sequences_have_no_training_row(data):
    dataset = Dataset(data)
    for index, source in enumerate(dataset.layout.sources):
        held = dataset.layout.holdout_sequences(index)
        assert (dataset.layout.train_rows(index, held) == -1).all()
        assert (dataset.layout.train_rows(index, np.arange(source.sequences)) >= 0).sum() == source.sequences - len(
            held
        )


def test_preparing_again_gives_identical_bytes_and_another_seed_another_order(data, prepare_recipe, tmp_path):
    again = prepare(prepare_recipe, tmp_path / "again")
    assert again == Dataset(data).manifest
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()
    verify_manifest(tmp_path / "again", again)
    other = prepare(dataclasses.replace(prepare_recipe, seed=8), tmp_path / "other")
    assert other["root"] != again["root"]
    assert [s["tokens"] for s in other["sources"]] == [s["tokens"] for s in again["sources"]]


def test_an_equal_preparation_is_kept_and_another_one_refused(data, prepare_recipe):
    assert prepare(prepare_recipe, data) == Dataset(data).manifest
    with pytest.raises(UsageError, match="prepared with another 'chunks'"):
        prepare(dataclasses.replace(prepare_recipe, chunks=4), data)


def test_ids_are_stored_in_the_smallest_type_that_holds_them():
    assert id_type(65536) == np.uint16
    assert id_type(65537) == np.uint32
    with pytest.raises(UsageError, match="do not fit"):
        id_type(2**32 + 1)


@pytest.mark.parametrize("file", ["train/chunk-00002.npy", "train/chunk-00002.leaves.npy", "holdout/code.npy"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "swap"])
def test_no_damaged_sequence_is_used(data, tmp_path, file, harm):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    target = copy / file
    content = bytearray(target.read_bytes())
    if harm == "flip":
        content[-7] ^= 4
        target.write_bytes(content)
    elif harm == "truncate":
        target.write_bytes(content[:-100])
    elif harm == "remove":
        target.unlink()
    else:
        other = target.with_name(target.name.replace("00002", "00001").replace("code", "books"))
        target.write_bytes(other.read_bytes())
    dataset = Dataset(copy)
    with pytest.raises(CorruptDataError, match=target.name.split(".")[0]):
        dataset.read(np.arange(dataset.size))
        dataset.holdout("code")


def flipped_gzip() -> bytes:
    content = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(999)), mtime=0))
    content[40] ^= 0xFF
    return bytes(content)


def source_of(tmp_path, name: str, content: bytes) -> dict[str, SourceConfig]:
    (tmp_path / name).write_bytes(content)
    return {"s": SourceConfig(str(tmp_path / name))}


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("empty.jsonl", b"", UsageError, "sources.s: holds no document"),
        ("blank.txt", b"", UsageError, "sources.s: none of its 1 documents is kept (empty 1)"),
        ("short.txt", b"too short", UsageError, "nothing is left to train on"),
        ("bad.jsonl", b'{"text": "ok"}\n{"text": \n', CorruptDataError, "bad.jsonl:2: not valid JSON"),
        ("field.jsonl", b'{"txt": "ok"}\n', CorruptDataError, "field.jsonl:1: no text under 'text'"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', CorruptDataError, "half.jsonl:1: half a surrogate pair"),
        ("latin.txt", "é".encode("latin-1"), CorruptDataError, "latin.txt:1: not UTF-8"),
        ("cut.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9)[:-20], CorruptDataError, "damaged or truncated archive"),
        ("kind.csv", b"a,b", UsageError, "kind.csv is none of"),
        ("flip.jsonl.gz", flipped_gzip(), CorruptDataError, "damaged or truncated archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_named_and_leaves_nothing(prepare_recipe, tmp_path, name, content, error, said):
    out = tmp_path / "out"
    with pytest.raises(error) as caught:
        prepare(dataclasses.replace(prepare_recipe, sources=source_of(tmp_path, name, content)), out)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_settings_are_named(prepare_recipe, tmp_path):
    cases = {
        "does not exist": {"sources": {"s": SourceConfig(str(tmp_path / "absent"))}},
        "cannot be filled": {"chunks": 10**6},
        "no tokenizer there": {"tokenizer": str(tmp_path / "absent.model")},
    }
    for said, change in cases.items():
        with pytest.raises(UsageError, match=said):
            prepare(dataclasses.replace(prepare_recipe, **change), tmp_path / "out")


def test_manifest_states_sources_licences_and_hashes_but_no_machine(data):
    text = (data / "manifest.json").read_text()
    manifest = json.loads(text)
    assert [s["licence"] for s in manifest["inputs"]["sources"]] == [
        "licence of books",
        "licence of encyclopedia",
        "licence of code",
    ]
    assert {"tokenizer/tokenizer.model", "documents/code.npy", "train/chunk-00004.npy"} <= manifest["files"].keys()
    assert str(data.parent) not in text


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.model", "documents/books.npy"])
def test_changed_tokenizers_and_tables_are_not_used(data, tmp_path, file):
    shutil.copytree(data, tmp_path / "copy")
    target = tmp_path / "copy" / file
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    dataset = Dataset(tmp_path / "copy")
    with pytest.raises(CorruptDataError, match=target.name):
        assert dataset.tokenizer
        for row in range(dataset.size):
            dataset.spans(row)


def test_files_of_a_directory_keep_their_paths_within_it(prepare_recipe, corpus, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "s" / name).mkdir(parents=True)
        shutil.copyfile(corpus / "books.jsonl", tmp_path / "s" / name / "x.jsonl")
    manifest = prepare(
        dataclasses.replace(prepare_recipe, sources={"s": SourceConfig(str(tmp_path / "s"))}), tmp_path / "o"
    )
    assert [file["name"] for file in manifest["inputs"]["sources"][0]["files"]] == ["a/x.jsonl", "b/x.jsonl"]


def test_weights_deal_sequences_out_more_or_less_often(prepare_recipe, tmp_path):
    weights = {"books": 2.5, "encyclopedia": 0.4, "code": 1.0}
    sources = {n: dataclasses.replace(s, weight=weights[n]) for n, s in prepare_recipe.sources.items()}
    prepare(dataclasses.replace(prepare_recipe, sources=sources), tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    stored = dataset.batch(dataset.prepared_seed, 0, dataset.size)
    for index, source in enumerate(dataset.manifest["sources"]):
        trainable = source["sequences"] - source["holdout_sequences"]
        mine = [tuple(row) for row in stored.ids[stored.sources == index].tolist()]
        assert len(mine) == source["dealt_sequences"] == round(weights[source["name"]] * trainable)
        held = {tuple(row) for row in dataset.holdout(source["name"]).tolist()}
        assert held.isdisjoint(mine)
        times = sorted({mine.count(row) for row in mine})
        assert times == {"books": [2, 3], "encyclopedia": [1], "code": [1]}[source["name"]]


def test_bad_and_long_documents_are_counted_by_policy(prepare_recipe, corpus, tmp_path):
    good = (corpus / "books.jsonl").read_bytes()
    long = json.dumps({"text": "long words " * 500}).encode() + b"\n"
    sources = source_of(tmp_path, "mixed.jsonl", good + b"nonsense\n" + long + b'{"text": ""}\n' + good)
    lenient = dataclasses.replace(prepare_recipe, sources=sources, bad_documents="skip", max_document_bytes=5000)
    manifest = prepare(lenient, tmp_path / "skip")
    (source,) = manifest["sources"]
    long_ones = sum(len(json.loads(line)["text"].encode()) > 5000 for line in good.splitlines())
    assert source["verdicts"] == {"empty": 1, "not_json": 1, "too_long": 1 + 2 * long_ones}
    assert source["documents"] == 63
    split = prepare(dataclasses.replace(lenient, long_documents="split"), tmp_path / "split")
    assert split["sources"][0]["verdicts"] == {"empty": 1, "not_json": 1}
    assert (
        split["sources"][0]["bytes"] == 2 * sum(len(json.loads(x)["text"].encode()) for x in good.splitlines()) + 5500
    )


def test_a_tokenizer_changed_after_preparation_is_another_preparation(data, prepare_recipe, tmp_path, corpus):
    other = tmp_path / "other.model"
    train_tokenizer(read_texts([corpus / "books.jsonl"]), VOCAB, other)
    with pytest.raises(UsageError, match="prepared with another 'tokenizer'"):
        prepare(dataclasses.replace(prepare_recipe, tokenizer=str(other)), data)


def test_a_changed_text_is_named(data, prepare_recipe, tmp_path):
    path = tmp_path / "books.jsonl"
    path.write_bytes(Path(prepare_recipe.sources["books"].path).read_bytes() + b'{"text": "more"}\n')
    sources = {**prepare_recipe.sources, "books": dataclasses.replace(prepare_recipe.sources["books"], path=str(path))}
    with pytest.raises(UsageError, match=r"another 'sources\.books' text in 'books\.jsonl'"):
        prepare(dataclasses.replace(prepare_recipe, sources=sources), data)


def test_what_was_read_is_kept_when_only_the_dealing_changes(prepare_recipe, tmp_path, monkeypatch):
    """A mistaken number of chunks must not cost hours of tokenising: the ids that were read are used again."""
    monkeypatch.setattr(pipeline, "_CHEAP_SECONDS", -1.0)
    with pytest.raises(UsageError, match="cannot be filled"):
        prepare(dataclasses.replace(prepare_recipe, chunks=10**6), tmp_path / "out")
    ids = tmp_path / "out.partial" / "read" / "000000.ids"
    before = ids.stat().st_mtime_ns
    with pytest.raises(UsageError, match="holds an unfinished preparation with another 'max_document_bytes'"):
        prepare(dataclasses.replace(prepare_recipe, max_document_bytes=2000), tmp_path / "out")
    monkeypatch.setattr(Read, "run", None)  # reading again would fail
    assert ids.stat().st_mtime_ns == before
    assert prepare(prepare_recipe, tmp_path / "out")["sources"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_preparations_do_not_share_a_directory(prepare_recipe, tmp_path):
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "started").touch()
    with locked(work, "a preparation"), pytest.raises(UsageError, match="a preparation already runs here"):
        prepare(prepare_recipe, tmp_path / "out")


def test_somebody_elses_directory_is_left_alone(prepare_recipe, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"out.partial: is needed to work in, but holds something else"):
        prepare(prepare_recipe, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"


def test_stages_whose_inputs_nothing_names_are_not_used(prepare_recipe, data, tmp_path):
    """What is left when a kill interrupts the removal of a working directory."""
    work = tmp_path / "out.partial"
    other = dataclasses.replace(prepare_recipe, sources=dict([next(iter(prepare_recipe.sources.items()))]))
    with pytest.raises(KeyboardInterrupt):

        def stop(stage: str, done: float, total: float) -> None:
            if stage.startswith("sort") and done == total:
                raise KeyboardInterrupt

        prepare(other, tmp_path / "out", stop)
    (work / "inputs.json").unlink()
    assert prepare(prepare_recipe, tmp_path / "out") == Dataset(data).manifest


def test_a_file_of_1970_is_hashed_like_any_other(prepare_recipe, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n} of some words"}) + "\n" for n in range(200)))
    os.utime(text, ns=(0, 0))
    recipe = dataclasses.replace(prepare_recipe, sources={"s": SourceConfig(str(text))}, chunks=1)
    (file,) = prepare(recipe, tmp_path / "out")["inputs"]["sources"][0]["files"]
    assert file["bytes"] == text.stat().st_size and len(file["sha256"]) == 64


def test_a_raw_file_that_changes_while_it_is_read_is_noticed(tmp_path, prepare_recipe):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n} of some words"}) + "\n" for n in range(200)))

    def change(stage: str, done: float, total: float) -> None:
        if stage.startswith("read") and text.stat().st_size == size:
            text.write_text(text.read_text() + json.dumps({"text": "one more"}) + "\n")

    size = text.stat().st_size
    recipe = dataclasses.replace(prepare_recipe, sources={"s": SourceConfig(str(text))}, chunks=1)
    with pytest.raises(UsageError, match=r"text.jsonl: changed while it was read; leave it alone"):
        prepare(recipe, tmp_path / "out", change)
    assert not (tmp_path / "out").exists()
    assert prepare(recipe, tmp_path / "out")["sources"][0]["documents"] == 201


@pytest.mark.parametrize("what", ["tokenizer", "hub"])
def test_a_tokenizer_or_a_hub_directory_that_changes_while_it_is_read_is_noticed(tmp_path, prepare_recipe, what):
    tokenizer = Path(shutil.copy(prepare_recipe.tokenizer, tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"some {n} words"}) + "\n" for n in range(99))
    )
    changed = {"tokenizer": tokenizer, "hub": tmp_path / "hub" / "rows.jsonl"}[what]

    def change(stage: str, done: float, total: float) -> None:
        if stage.startswith("read") and done == total:
            changed.write_bytes(changed.read_bytes() + b"\n")

    sources = {"s": SourceConfig(str(tmp_path / "hub"), "huggingface")}
    recipe = dataclasses.replace(prepare_recipe, sources=sources, tokenizer=str(tokenizer), chunks=1)
    with pytest.raises(UsageError, match=rf"{'hub' if what == 'hub' else tokenizer.name}: changed while it was read"):
        prepare(recipe, tmp_path / "out", change)


def test_ready_sequences_are_a_source_like_others(data, prepare_recipe, tmp_path):
    dataset = Dataset(data)
    batch = dataset.batch(7, 0, 60)
    rows = zip(batch.ids.tolist(), batch.sources.tolist(), strict=True)
    lines = [json.dumps({"token_ids": ids, "source": dataset.source_names[source]}) for ids, source in rows]
    (tmp_path / "train_000.jsonl").write_text("\n".join(lines) + "\n")
    sources = {
        name: SourceConfig(str(tmp_path / "train_000.jsonl"), "amber", subset=name) for name in ("books", "code")
    }
    prepare(dataclasses.replace(prepare_recipe, sources=sources, holdout=0), tmp_path / "out")
    again = Dataset(tmp_path / "out")
    stored = again.batch(7, 0, again.size)
    found = sorted(zip(stored.sources.tolist(), stored.ids.tolist(), strict=True))
    names = [dataset.source_names[source] for source in batch.sources]
    expected = sorted(
        (("books", "code").index(name), ids)
        for name, ids in zip(names, batch.ids.tolist(), strict=True)
        if name in sources
    )
    assert found == expected
    (span,) = again.spans(0)
    assert (span.start, span.end, span.file) == (0, again.sequence_length, "train_000.jsonl")


def test_a_hub_data_set_is_a_source_like_others(prepare_recipe, corpus, tmp_path):
    """A local directory goes the way of a hub's name; its shards have no files to hash, its documents their hashes."""
    (tmp_path / "hub").mkdir()
    shutil.copyfile(corpus / "books.jsonl", tmp_path / "hub" / "rows.jsonl")
    sources = {"books": SourceConfig(str(tmp_path / "hub"), "huggingface", revision="abc")}
    manifest = prepare(dataclasses.replace(prepare_recipe, sources=sources), tmp_path / "out")
    plain = {"books": SourceConfig(str(corpus / "books.jsonl"))}
    expected = prepare(dataclasses.replace(prepare_recipe, sources=plain), tmp_path / "plain")
    assert manifest["inputs"]["sources"][0]["files"] == [{"name": "shard 0"}]
    assert (manifest["root"], manifest["corpus_root"]) == (expected["root"], expected["corpus_root"])
