from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import CONTEXT, VOCAB
from mobillama.data import rederive as rederiving
from mobillama.data import verify as module
from mobillama.data.amber_import import import_amber
from mobillama.data.dataset import Dataset
from mobillama.data.documents import read_piece
from mobillama.data.ledger import DOCUMENT, DUPLICATE, EXACT_DUPLICATE, NEAR_DUPLICATE
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.rederive import rederive, sample_rows
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.data.verify import verify
from mobillama.errors import CorruptDataError, UsageError, VerificationError
from mobillama.recipe import CleanConfig, PrepareRecipe, SourceConfig
from mobillama.record.files import sha256_file, sha256_json, write_json
from mobillama.record.merkle import leaf_digest, merkle_root

LENGTH = CONTEXT + 1
LIMIT = 1500


def quiet(stage: str, done: float, total: float) -> None:
    assert 0 <= done <= total


@pytest.fixture
def copy(data, tmp_path) -> Path:
    return shutil.copytree(data, tmp_path / "copy")


@pytest.fixture(scope="module")
def raw(corpus, tmp_path_factory) -> Path:
    """Raw files of all formats, with what cleaning is for."""
    folder = tmp_path_factory.mktemp("raw")
    texts = [json.loads(line)["text"] for line in (corpus / "books.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "web" / "more").mkdir(parents=True)
    first = ["\ufeff" + text.replace("\n", "\r\n") for text in [*(text[:4000] for text in texts[:12]), texts[1][:1200]]]
    lines = [json.dumps({"body": text}) for text in first]
    lines[3:3] = ["", "no JSON", json.dumps({"other": 1})]
    (folder / "web" / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    again = [texts[1][:1200], texts[1][:1190], texts[12][:1400], "cafe\u0301\x07 " * 99]
    packed = "".join(json.dumps({"body": text}) + "\n" for text in again).encode()
    (folder / "web" / "more" / "b.jsonl.gz").write_bytes(gzip.compress(packed, mtime=0))
    table = pyarrow.table({"body": texts[13:20], "page": list(range(7))})
    pyarrow.parquet.write_table(table, folder / "pages.parquet")
    (folder / "code").mkdir()
    for number, text in enumerate(texts[20:26]):
        (folder / "code" / f"{number}.py").write_text(text, encoding="utf-8", newline="")
    (folder / "ready.jsonl").write_text("".join(f"{line}\n" for line in amber_lines(80)), encoding="utf-8")
    return folder


def amber_lines(count: int) -> list[str]:
    draw = random.Random(1)
    return [
        json.dumps({"token_ids": draw.choices(range(VOCAB), k=LENGTH), "source": draw.choice(["c4", "arxiv"])})
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def mixed(raw, tokenizer_path, tmp_path_factory) -> Path:
    """A data set with every format that is a file, cleaning, duplicates, long and bad documents, and weights."""
    clean = CleanConfig(repair=True, exact_duplicates=True, near_duplicates=True)
    recipe = PrepareRecipe(
        sources={
            "web": SourceConfig(str(raw / "web"), text_field="body", clean=clean, weight=1.5),
            "pages": SourceConfig(str(raw / "pages.parquet"), "parquet", text_field="body"),
            "code": SourceConfig(str(raw / "code"), "text", files="**/*.py"),
            "c4": SourceConfig(str(raw / "ready.jsonl"), "amber", subset="c4", weight=0.5),
            "arxiv": SourceConfig(str(raw / "ready.jsonl"), "amber", subset="arxiv"),
        },
        tokenizer=str(tokenizer_path),
        sequence_length=LENGTH,
        holdout=2,
        chunks=3,
        max_document_bytes=LIMIT,
        long_documents="split",
        bad_documents="skip",
    )
    out = tmp_path_factory.mktemp("mixed") / "data"
    prepare(recipe, out)
    return out


@pytest.fixture(scope="module")
def imported(tokenizer_path, tmp_path_factory) -> Path:
    """An imported data set, without a hold-out."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "raw").mkdir()
    lines = amber_lines(50)
    for number in range(2):
        part = lines[20 * number : 20 + 30 * number]
        (folder / "raw" / f"train_{number:03d}.jsonl").write_text("".join(f"{line}\n" for line in part))
    import_amber(folder / "raw", tokenizer_path, folder / "data", quiet)
    return folder / "data"


def manifest_of(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def rewrite(path: Path, manifest: dict) -> None:
    """Write a manifest that describes the files as they now are, with a right digest."""
    for name, fact in manifest["files"].items():
        fact.update(bytes=(path / name).stat().st_size, sha256=sha256_file(path / name))
    del manifest["digest"]
    manifest["digest"] = sha256_json(manifest)
    write_json(path / "manifest.json", manifest)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def change(path: Path, at: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def test_whole_data_sets_are_found_whole(data, mixed, imported):
    for path in (data, mixed, imported):
        manifest = manifest_of(path)
        rows = manifest["train_sequences"] + sum(entry["rows"] for entry in manifest["holdout"])
        assert verify(path, 1, quiet) == {
            "files": len(manifest["files"]),
            "bytes": sum((path / name).stat().st_size for name in manifest["files"]),
            "sequences": rows,
            "root": manifest["root"],
            "notes": [],
        }
    assert {EXACT_DUPLICATE, NEAR_DUPLICATE, "not_json", "no_text"} <= manifest_of(mixed)["sources"][0][
        "verdicts"
    ].keys()


def test_processes_find_the_same_as_one(data, copy, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_PER_PROCESS", 1 << 10)
    reports = []
    assert verify(data, 2, lambda *report: reports.append(report)) == verify(data, 1, quiet)
    size = sum(fact["bytes"] for fact in manifest_of(data)["files"].values())
    assert reports[-1] == ("verify files", size, size)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    change(copy / "train/chunk-00001.npy", -1)
    (copy / "holdout/code.npy").unlink()
    said = []
    for workers in (1, 2):
        with pytest.raises(CorruptDataError) as caught:
            verify(copy, workers, quiet)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "2 of 23 files damaged" in said[0]
    assert f"{copy}/holdout/code.npy: missing" in said[0]


def damages(path: Path, count: int):
    """Yield what each damaged file holds instead: flipped bits, cut ends, and exchanged files."""
    draw = random.Random(7)
    names = ["manifest.json", *manifest_of(path)["files"]]
    whole = {name: (path / name).read_bytes() for name in names}
    kinds = [[name for name in names if name.startswith(kind)] for kind in ("train/", "holdout/", "documents/")]
    for number in range(count):
        name = draw.choice(names)
        content = whole[name]
        if number % 4 == 0:
            yield {name: content[: draw.randrange(len(content))]}
        elif number % 4 == 1:
            one, other = draw.sample(draw.choice(kinds), 2)
            if whole[one] != whole[other]:
                yield {one: whole[other], other: whole[one]}
        else:
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            yield {name: bytes(changed)}


def test_every_injected_damage_is_found_and_named(copy):
    missed, tried = [], 0
    for damage in damages(copy, 1040):
        tried += 1
        before = {name: (copy / name).read_bytes() for name in damage}
        for name, content in damage.items():
            (copy / name).write_bytes(content)
        # Where the format's name itself is hit, the manifest seems to be one of something else.
        allowed = (CorruptDataError, UsageError) if "manifest.json" in damage else CorruptDataError
        try:
            verify(copy, 1, quiet)
            missed.append((tried, list(damage)))
        except allowed as error:
            if not all(f"{copy / name}: " in str(error) for name in damage):
                missed.append((tried, list(damage), str(error)))
        for name, content in before.items():
            (copy / name).write_bytes(content)
    assert missed == []
    assert tried >= 1000
    verify(copy, 1, quiet)


@pytest.mark.parametrize("harm", ["cut the last line feed", "add a space", "write a number in another way"])
def test_a_manifest_with_the_same_meaning_in_other_bytes_is_damaged(copy, harm):
    manifest = manifest_of(copy)
    manifest["inputs"]["sources"][0]["weight"] = 1e-05
    manifest["sources"][0]["dealt_sequences"] = 0
    if harm == "write a number in another way":
        rewrite(copy, manifest)
    text = (copy / "manifest.json").read_text()
    changed = {"cut the last line feed": text[:-1], "add a space": text + " "}.get(harm, text.replace("1e-05", "1E-05"))
    assert changed != text
    (copy / "manifest.json").write_text(changed)
    with pytest.raises(CorruptDataError, match=r"manifest\.json: was changed"):
        verify(copy, 1, quiet)


def test_all_damage_is_listed_up_to_twenty_files(copy):
    names = list(manifest_of(copy)["files"])
    for name in names:
        change(copy / name, -1)
    with pytest.raises(CorruptDataError) as caught:
        verify(copy, 1, quiet)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{copy}: 23 of 23 files damaged; restore them from a copy or make the data again"
    assert [line.split(": ")[0].strip() for line in lines[1:21]] == [str(copy / name) for name in names[:20]]
    assert lines[21].startswith("  … and")


def test_damaged_sequences_are_counted(copy):
    file = copy / "train/chunk-00002.npy"
    for row in (3, 5):
        change(file, -2 * LENGTH * row)
    rows = manifest_of(copy)["chunks"][2]["rows"]
    with pytest.raises(CorruptDataError, match=f"; 2 of its sequences, the first is {rows - 5}, are not those of its"):
        verify(copy, 1, quiet)


def test_roots_over_blocks_are_the_roots_over_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 31)  # blocks of four rows
    rows = np.random.default_rng(1).integers(0, 256, (70, 7), dtype=np.uint8)
    for count in range(len(rows)):
        (tmp_path / "x.npy").write_bytes(b"head" + rows[:count].tobytes())
        _, root, _ = module._hash_rows(tmp_path / "x.npy", 4, 7)
        assert root == merkle_root([leaf_digest(row.data) for row in rows[:count]])


def change_row(path: Path, manifest: dict) -> None:
    change(path / "train/chunk-00002.npy", -2)


def change_row_and_leaf(path: Path, manifest: dict) -> None:
    change_row(path, manifest)
    leaves = path / "train/chunk-00002.leaves.npy"
    row = (path / "train/chunk-00002.npy").read_bytes()[-2 * LENGTH :]
    leaves.write_bytes(leaves.read_bytes()[:-32] + leaf_digest(row))


def change_held_out_row_and_leaf(path: Path, manifest: dict) -> None:
    change(path / "holdout/code.npy", -2)
    leaves = path / "holdout/code.leaves.npy"
    row = (path / "holdout/code.npy").read_bytes()[-2 * LENGTH :]
    leaves.write_bytes(leaves.read_bytes()[:-32] + leaf_digest(row))


def equal_chunks(manifest: dict) -> tuple[int, int]:
    rows = [chunk["rows"] for chunk in manifest["chunks"]]
    (often, _), *_ = Counter(rows).most_common()
    first = rows.index(often)
    return first, rows.index(often, first + 1)


def swap_chunks(path: Path, manifest: dict) -> None:
    one, other = (manifest["chunks"][number]["file"] for number in equal_chunks(manifest))
    swap(path / one, path / other)
    swap(path / one.replace(".npy", ".leaves.npy"), path / other.replace(".npy", ".leaves.npy"))


def swap_chunks_and_roots(path: Path, manifest: dict) -> None:
    swap_chunks(path, manifest)
    one, other = (manifest["chunks"][number] for number in equal_chunks(manifest))
    one["root"], other["root"] = other["root"], one["root"]


def swap_entries_of_chunks(path: Path, manifest: dict) -> None:
    one, other = equal_chunks(manifest)
    chunks = manifest["chunks"]
    chunks[one], chunks[other] = chunks[other], chunks[one]
    manifest["root"] = merkle_root([bytes.fromhex(chunk["root"]) for chunk in chunks]).hex()


def turn_bytes_of_ids(path: Path, manifest: dict) -> None:
    file = path / "train/chunk-00002.npy"
    file.write_bytes(file.read_bytes().replace(b"'<u2'", b"'>u2'", 1))


def edit_table(path: Path, column: str, row: int, value: object) -> None:
    table = np.load(path / "documents/books.npy", mmap_mode="r+")
    table[column][row] = value
    table.flush()


def take_another_tokenizer(path: Path, manifest: dict) -> None:
    words = ["wholly other words", "give other pieces", "at vero eos et accusamus et iusto odio"]
    file = path / "tokenizer" / "tokenizer.model"
    train_tokenizer([f"{word} {n}" for word in words for n in range(99)], 320, file)
    manifest["inputs"]["tokenizer_file"] = sha256_file(file)


def state(*keys: object, by: object):
    def harm(path: Path, manifest: dict) -> None:
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = by(place[keys[-1]]) if callable(by) else by

    return harm


REWRITTEN = {
    "row": (change_row, "train/chunk-00002.leaves.npy: 1 leaves, the first is "),
    "row and leaf": (change_row_and_leaf, "train/chunk-00002.npy: the Merkle root"),
    "held-out row and leaf": (change_held_out_row_and_leaf, "holdout/code.npy: the Merkle root"),
    "chunks": (swap_chunks, ".npy: the Merkle root"),
    "chunks and roots": (swap_chunks_and_roots, "manifest.json: states root as"),
    "entries of chunks": (swap_entries_of_chunks, "manifest.json: states chunks' files as"),
    "byte order": (turn_bytes_of_ids, "train/chunk-00002.npy: holds ("),
    "digest of a document": (lambda p, m: edit_table(p, "digest", 3, 7), "manifest.json: states corpus_root as"),
    "end of a document": (lambda p, m: edit_table(p, "end", 3, 0), "books.npy: document 3 has an impossible entry"),
    "verdict": (lambda p, m: edit_table(p, "verdict", 4, 1), "books.npy: document 4 has an impossible entry"),
    "file of a document": (lambda p, m: edit_table(p, "file", 5, 1), "books.npy: document 5 has an impossible entry"),
    "last end": (lambda p, m: edit_table(p, "end", -1, 10**6), "books.npy: its tokens are 1000000"),
    "tokenizer": (take_another_tokenizer, "tokenizer.model: its ids mean something else"),
    "tokenizer's file": (state("inputs", "tokenizer_file", by="0" * 64), "does not hold the file that tokenised"),
    "tokenizer's digest": (state("inputs", "tokenizer", by="0" * 64), "tokenizer.json: its ids mean something else"),
    "tokens": (state("sources", 0, "tokens", by=lambda n: n + 1), "books.npy: its tokens are"),
    "sequences": (state("sources", 1, "sequences", by=lambda n: n + 1), "states sequences of encyclopedia as"),
    "kept": (state("sources", 0, "kept_documents", by=29), "books.npy: its verdicts are {'kept': 30}"),
    "documents": (state("sources", 0, "documents", by=29), "books.npy: holds (30,)"),
    "dealt": (state("sources", 2, "dealt_sequences", by=lambda n: n - 1), "states dealt_sequences of code as"),
    "held out": (state("sources", 2, "holdout_sequences", by=lambda n: n + 1), "states hold-out's rows as"),
    "rows": (state("chunks", 3, "rows", by=lambda n: n - 1), "chunk-00003.npy: holds ("),
    "too many rows": (state("chunks", 3, "rows", by=10**6), "chunk-00003.npy: holds fewer than 1000000 sequences"),
    "train_sequences": (state("train_sequences", by=lambda n: n - 1), "states train_sequences as"),
    "dtype": (state("dtype", by="<u4"), "states dtype as <u4, but it comes out as <u2"),
    "chunks' number": (state("inputs", "chunks", by=4), "states number of chunks as 5, but it comes out as 4"),
    "root": (state("root", by="0" * 64), "states root as 0000"),
    "file that is not described": (lambda p, m: m["files"].pop("train/chunk-00001.npy"), "description of train/chunk-"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_manifest_rewritten_for_other_files_is_found(copy, name):
    harm, said = REWRITTEN[name]
    manifest = manifest_of(copy)
    harm(copy, manifest)
    rewrite(copy, manifest)
    with pytest.raises(VerificationError) as caught:
        verify(copy, 1, quiet)
    assert said in str(caught.value)


def edited(path: Path, copy: Path, name: str, column: str | None, row: int, value: int) -> Path:
    """Return a copy in which an entry of an array is another, with a manifest for it."""
    shutil.copytree(path, copy)
    array = np.load(copy / name, mmap_mode="r+")
    (array if column is None else array[column])[row] = value
    array.flush()
    rewrite(copy, manifest_of(copy))
    return copy


def test_tables_of_duplicates_and_labels_must_fit(mixed, imported, tmp_path):
    duplicates = np.load(mixed / "documents/duplicates.npy")
    assert duplicates.dtype == DUPLICATE
    assert np.load(mixed / "documents/web.npy").dtype == DOCUMENT
    wrong = {
        "document": int(duplicates["of_document"][0]),  # one that was kept
        "of_document": int(duplicates["document"][1]),  # one that was dropped
        "of_source": 9,
    }
    for column, value in wrong.items():
        harmed = edited(mixed, tmp_path / column, "documents/duplicates.npy", column, 0, value)
        with pytest.raises(VerificationError, match=r"duplicates\.npy: does not fit the verdicts"):
            verify(harmed, 1, quiet)
    again = (int(duplicates["source"][0]), int(duplicates["document"][0]))
    assert int(duplicates["source"][1]) == again[0]
    harmed = edited(mixed, tmp_path / "again", "documents/duplicates.npy", "document", 1, again[1])
    with pytest.raises(VerificationError, match=r"duplicates\.npy: does not fit the verdicts"):
        verify(harmed, 1, quiet)
    end = int(np.load(mixed / "documents/web.npy")["end"][again[1]])
    harmed = edited(mixed, tmp_path / "back", "documents/web.npy", "end", again[1], end - 1)
    with pytest.raises(VerificationError, match=rf"web\.npy: document {again[1]} has an impossible entry"):
        verify(harmed, 1, quiet)
    label = int(np.load(imported / "labels/chunk-00001.npy")[4])
    harmed = edited(imported, tmp_path / "labels", "labels/chunk-00001.npy", None, 4, 1 - label)
    with pytest.raises(VerificationError, match=r"chunk-00001\.npy: labels \["):
        verify(harmed, 1, quiet)


def test_files_that_no_manifest_names_are_noted(copy):
    (copy / "train" / "extra.npy").write_bytes(b"x")
    (copy / ".lock").touch()
    (copy / "notes" / "deep").mkdir(parents=True)
    (copy / "notes" / "facts.json").touch()
    (copy / "notes" / "deep" / "more").touch()
    (copy / "trace-index").mkdir()
    (copy / "trace-index" / "facts.json").touch()  # what trace keeps there is ours
    assert verify(copy, 1, quiet)["notes"] == [
        f"{copy}/.lock: a file that the manifest does not name",
        f"{copy}/notes/: 2 files that the manifest does not name",
        f"{copy}/train/extra.npy: a file that the manifest does not name",
    ]


def test_hashing_needs_no_datatrove(data):
    code = f"""
import sys
from pathlib import Path
from mobillama.data.verify import verify
verify(Path({str(data)!r}), 1, lambda *report: None)
sys.exit("datatrove" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["data", "mixed", "imported"])
def test_every_sequence_is_made_anew_and_every_raw_file_read_once(name, request, monkeypatch):
    opened: Counter[str] = Counter()

    def counting(piece, reading):
        opened[piece.path] += 1
        return read_piece(piece, reading)

    monkeypatch.setattr(rederiving, "read_piece", counting)
    monkeypatch.setattr(rederiving, "_DOCUMENTS_AT_ONCE", 7)
    dataset = Dataset(request.getfixturevalue(name))
    reports = []
    assert rederive(dataset, np.arange(dataset.size), {}, lambda *report: reports.append(report)) == dataset.size
    assert reports[-1][1] == reports[-1][2] > 7
    assert set(opened.values()) == {1}
    assert len(opened) == {"data": 32, "mixed": 10, "imported": 2}[name]


def test_rows_are_sampled_without_chance(data):
    dataset = Dataset(data)
    rows = sample_rows(dataset, 50, 3)
    assert rows.tolist() == sample_rows(dataset, 50, 3).tolist() == sorted(set(rows.tolist()))
    assert rows.tolist() != sample_rows(dataset, 50, 4).tolist()
    assert sample_rows(dataset, 10**6, 3).tolist() == list(range(dataset.size))
    assert rederive(dataset, sample_rows(dataset, 0, 3), {}, quiet) == 0


def test_no_line_behind_the_last_wanted_one_is_read(data, corpus, tmp_path, monkeypatch):
    lines_read = []

    def counting(piece, reading):
        for document in read_piece(piece, reading):
            lines_read.append(document.line)
            yield document

    monkeypatch.setattr(rederiving, "read_piece", counting)
    dataset = Dataset(data)
    candidates = [row for row in range(0, dataset.size, 7) if source(dataset, row) == 0]
    rows = np.array([row for row in candidates if dataset.spans(row)[-1].line <= 9])
    moved = tmp_path / "moved.jsonl"
    shutil.copyfile(corpus / "books.jsonl", moved)
    assert rederive(dataset, rows, {"books": moved}, quiet) == len(rows) > 9
    assert lines_read == list(range(1, 10))
    for old, new in (("e", "é"), ("{", "[")):  # another key, no JSON
        replace_line(moved, 8, old, new)
        lines_read.clear()
        with pytest.raises(VerificationError, match=r"moved\.jsonl:8: is not the document"):
            rederive(dataset, rows, {"books": moved}, quiet)
        assert lines_read == list(range(1, 11))


def source(dataset: Dataset, row: int) -> int:
    return int(dataset.layout.source_of([row])[0])


def moved(raw: Path, to: Path) -> dict[str, Path]:
    shutil.copytree(raw, to)
    places = {"web": "web", "pages": "pages.parquet", "code": "code", "c4": "ready.jsonl", "arxiv": "ready.jsonl"}
    return {name: to / place for name, place in places.items()}


def replace_line(path: Path, number: int, old: str, new: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    "place", ["web/a.jsonl:9", "web/more/b.jsonl.gz:4", "pages.parquet:5", "code/3.py:1", "ready.jsonl"]
)
def test_a_changed_raw_document_is_named(mixed, raw, tmp_path, place):
    dataset = Dataset(mixed)
    if place == "ready.jsonl":  # a sequence that is neither held out nor left out
        row = next(row for row in range(dataset.size) if dataset.source_names[source(dataset, row)] == "c4")
        place = f"ready.jsonl:{dataset.spans(row)[0].line}"
    places = moved(raw, tmp_path / "moved")
    name, number = place.split(":")
    file = tmp_path / "moved" / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"\\u0301", b"\\u0300", 1)))
    elif name.endswith(".parquet"):
        columns = pyarrow.parquet.read_table(file).to_pydict()
        columns["body"][int(number) - 1] = columns["body"][int(number) - 1].replace("e", "é", 1)
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    elif name.endswith(".py"):
        file.write_text(file.read_text(encoding="utf-8").replace("e", "é", 1), encoding="utf-8")
    else:
        replace_line(file, int(number), "1" if name == "ready.jsonl" else "e", "2")
    with pytest.raises(VerificationError) as caught:
        rederive(dataset, np.arange(dataset.size), places, quiet)
    assert f"{tmp_path}/moved/{place}: is not the document that was prepared" in str(caught.value)


@pytest.mark.parametrize("name", ["pages.parquet", "code/2.py", "web"])
def test_a_missing_raw_file_is_named_with_its_remedy(mixed, raw, tmp_path, name):
    places = moved(raw, tmp_path / "moved")
    (tmp_path / "moved" / name).rename(tmp_path / "away")
    label = name.split(".")[0].split("/")[0]
    dataset = Dataset(mixed)
    with pytest.raises(UsageError) as caught:
        rederive(dataset, np.arange(dataset.size), places, quiet)
    assert str(caught.value).startswith(f"{tmp_path}/moved/{name}")
    assert f"--source {label}=PATH" in str(caught.value)


def test_a_directory_without_a_record_of_its_raw_files_asks_for_them(copy, corpus):
    write_json(copy / "preparation.json", {})
    dataset = Dataset(copy)
    row = next(row for row in range(dataset.size) if source(dataset, row) == 0)
    with pytest.raises(UsageError, match="--source books=PATH"):
        rederive(dataset, np.array([row]), {}, quiet)
    assert rederive(dataset, np.array([row]), {"books": corpus}, quiet) == 1


def test_chunks_swapped_with_all_their_roots_do_not_come_out_of_the_documents(copy):
    manifest = manifest_of(copy)
    swap_chunks_and_roots(copy, manifest)
    manifest["root"] = merkle_root([bytes.fromhex(chunk["root"]) for chunk in manifest["chunks"]]).hex()
    rewrite(copy, manifest)
    verify(copy, 1, quiet)
    dataset = Dataset(copy)
    with pytest.raises(VerificationError, match=r"gives other ids than stored row \d+ has"):
        rederive(dataset, sample_rows(dataset, 100, 0), {}, quiet)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"repair": False}, "web/a.jsonl:1: gives other ids than stored row"),
        ({"c4_quality": True}, "was kept in source 'web', but is dropped now"),
    ],
    ids=["repair", "rule"],
)
def test_documents_cleaned_in_another_way_are_found(mixed, tmp_path, settings, said):
    shutil.copytree(mixed, tmp_path / "copy")
    manifest = manifest_of(mixed)
    manifest["inputs"]["sources"][0]["clean"].update(settings)
    rewrite(tmp_path / "copy", manifest)
    dataset = Dataset(tmp_path / "copy")
    with pytest.raises(VerificationError) as caught:
        rederive(dataset, np.arange(dataset.size), {}, quiet)
    assert said in str(caught.value)


def test_ready_sequences_of_another_label_are_found(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    manifest = manifest_of(mixed)
    manifest["inputs"]["sources"][3]["subset"] = "arxiv"
    rewrite(tmp_path / "copy", manifest)
    dataset = Dataset(tmp_path / "copy")
    with pytest.raises(VerificationError, match=r"ready\.jsonl:\d+: is a sequence of 'c4', not of 'arxiv'"):
        rederive(dataset, np.arange(dataset.size), {}, quiet)


def test_a_ledger_with_other_lengths_is_found(data, tmp_path):
    end = int(np.load(data / "documents/books.npy")["end"][-1])
    dataset = Dataset(edited(data, tmp_path / "long", "documents/books.npy", "end", -1, end + 1))
    last = next(
        row for row in range(dataset.size) if source(dataset, row) == 0 and dataset.spans(row)[-1].document == 29
    )
    with pytest.raises(VerificationError, match=r"books\.jsonl:30: gives other ids"):
        rederive(dataset, np.array([last]), {}, quiet)
    dataset = Dataset(edited(data, tmp_path / "back", "documents/books.npy", "end", 4, 0))
    with pytest.raises(VerificationError, match=r"books\.npy: has no documents for all of stored row"):
        rederive(dataset, np.arange(dataset.size), {}, quiet)
