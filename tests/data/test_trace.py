"""Brute force over the raw texts is the oracle: what is found, and where, must be every occurrence and no other."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mobillama.data import trace as trace_module
from mobillama.data import trace_index
from mobillama.data.amber_export import export_amber
from mobillama.data.amber_import import import_amber
from mobillama.data.dataset import INDEX_NAME, Dataset
from mobillama.data.documents import Piece, Reading, read_piece, source_files
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.tokenizer import load_tokenizer
from mobillama.data.trace import steps_of_rows, trace
from mobillama.data.trace_index import FACTS_NAME, build_index
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import PrepareRecipe, SourceConfig
from mobillama.workflows.tracing import show_trace

LENGTH = 33
AWKWARD = [
    "naïve café — “quotes” … 漢字の文章、長い文章です。🦙🦙 x̂ Привет, мир! Ελληνικά ½² a\u3000b\u00a0c",
    "def f(x):\n\tif x:\n        return {  'a':   1 }  # fooBar HTTPServer\r\n\n\nself.assertEqual(f(0), None)\n",
    "<s> </s> <unk> <0x0A> ▁ ▁▁ _x_ 1234567890 3.14159 0x1F \x00\x01\x7f end",
    " leading and trailing, aaaaaa banana bananana ",
]


def long_texts() -> list[str]:
    """A text of many windows without a space, one of digits and words, and one that repeats itself."""
    draw = random.Random(1)
    run = "".join(draw.choices("abcdefghij", k=9000))
    words = " ".join(f"{draw.choice(['alpha', 'Beta', 'gamma-', 'été'])}{draw.randrange(500)}" for _ in range(2500))
    return [run, words, " ".join(f"ab ab ab{n}" for n in range(1000))]


@dataclass
class Known:
    """A data set, and for each of its documents the bytes of its tokens and which of them are stored."""

    dataset: Dataset
    documents: dict[tuple[str, int], tuple[list[bytes], list[bool]]]

    def occurrences(self, text: str) -> set[tuple[str, int, int, int]]:
        """Source, document, first token and count of tokens of each place where a text stands and is stored."""
        needle, found = text.replace("▁", " ").encode() if self.is_llama else text.encode(), set()
        for (source, number), (pieces, stored) in self.documents.items():
            whole = b"".join(pieces)
            if needle not in whole:
                continue
            owner = [token for token, piece in enumerate(pieces) for _ in piece]
            for at in range(len(whole)):
                if whole.startswith(needle, at):
                    first, last = owner[at], owner[at + len(needle) - 1]
                    if all(stored[first : last + 1]):
                        found.add((source, number, first, last + 1 - first))
        return found

    @property
    def is_llama(self) -> bool:
        return self.dataset.tokenizer.bos_id is not None

    def texts(self) -> list[str]:
        return [b"".join(pieces).decode() for pieces, _ in self.documents.values()]


def known(recipe: PrepareRecipe, path: Path) -> Known:
    """Tokenise the raw documents again, and look up which of their sequences are stored by reading all that are."""
    dataset, length = Dataset(path), recipe.sequence_length
    tokenizer = load_tokenizer(Path(recipe.tokenizer))
    trained = dataset.batch(dataset.prepared_seed, 0, dataset.size)
    documents = {}
    for index, (name, source) in enumerate(recipe.sources.items()):
        rows = [*trained.ids[trained.sources == index].tolist(), *dataset.holdout(name).tolist()]
        kept = {tuple(row) for row in rows}
        texts = [d.text for file in source_files(source, name) for d in read_piece(Piece(str(file), 0), Reading())]
        encoded = [[*tokenizer.encode([text])[0], tokenizer.eos_id] for text in texts]
        stream = [i for ids in encoded for i in ids]
        stored = [tuple(stream[at // length * length :][:length]) in kept for at in range(0, len(stream), length)]
        start = 0
        for number, ids in enumerate(encoded):
            within = [stored[token // length] for token in range(start, start + len(ids))]
            documents[name, number] = ([tokenizer.token_bytes[i] for i in ids], within)
            start += len(ids)
    return Known(dataset, documents)


@pytest.fixture(scope="module")
def plain(data, prepare_recipe, tmp_path_factory) -> Known:
    path = tmp_path_factory.mktemp("plain") / "data"
    shutil.copytree(data, path)
    return known(prepare_recipe, path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("byte-level")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(AWKWARD * 5, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def weighted_recipe(folder: Path, tokenizer: Path) -> PrepareRecipe:
    for name in ("twice", "half"):
        texts = AWKWARD + long_texts() + [f"{name} marker number {n}, of {n * 7}." for n in range(400)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    sources = {name: SourceConfig(str(folder / f"{name}.jsonl"), weight=w) for name, w in (("twice", 2), ("half", 0.5))}
    return PrepareRecipe(sources, str(tokenizer), sequence_length=LENGTH, holdout=0.1, chunks=3, seed=5)


@pytest.fixture(scope="module", params=["llama", "byte-level"])
def weighted(request, tokenizer_path, byte_level, tmp_path_factory) -> Known:
    """Two sources of awkward texts, one trained twice, the other half."""
    folder = tmp_path_factory.mktemp("weighted")
    recipe = weighted_recipe(folder, tokenizer_path if request.param == "llama" else byte_level)
    prepare(recipe, folder / "data")
    return known(recipe, folder / "data")


def samples(texts: list[str], count: int, longest: int, seed: int) -> list[str]:
    """Substrings that begin and end anywhere, but hold a letter or digit."""
    draw, out = random.Random(seed), []
    while len(out) < count:
        text = draw.choice(texts)
        length = min(draw.randint(3, draw.choice([8, 30, longest])), len(text))
        start = draw.randrange(len(text) - length + 1)
        part = text[start : start + length]
        if len(part) >= 3 and any(character.isalnum() for character in part):
            out.append(part)
    return out


def found(dataset: Dataset, text: str) -> set[tuple[str, int, int, int]]:
    hits = trace(dataset, text, 1_000_000)
    assert hits.exact
    assert hits.total == len(hits.occurrences)
    held = [dataset.layout.holdout_sequences(index).tolist() for index in range(len(dataset.source_names))]
    places = set()
    for occurrence in hits.occurrences:
        here = b""
        for part in occurrence.parts:  # what the rows hold, read as training reads it
            index = dataset.source_names.index(occurrence.source)
            assert part.held_out == (part.sequence in held[index])
            if part.held_out:
                sequences = dataset.holdout(occurrence.source, 1, held[index].index(part.sequence))
            else:
                sequences = dataset.read(np.array(part.rows))
            assert (sequences == sequences[0]).all()
            here += b"".join(dataset.tokenizer.token_bytes[i] for i in sequences[0][part.start : part.end].tolist())
        assert occurrence.text.encode() in here
        count = sum(part.end - part.start for part in occurrence.parts)
        places.add((occurrence.source, occurrence.document, occurrence.token, count))
    return places


def test_every_occurrence_is_found_and_no_other(plain):
    for text in [*samples(plain.texts(), 30, 400, 0), "e, a", "ing\n"]:
        assert found(plain.dataset, text) == plain.occurrences(text), repr(text)


def test_a_lock_that_tantivy_makes_late_hurts_no_search(plain, monkeypatch, tmp_path):
    def late(path, dir_fd=None, rmdir=os.rmdir):
        (Path(path) / ".tantivy-meta.lock").touch()
        rmdir(path, dir_fd=dir_fd)

    text = plain.texts()[0][:20]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "rmdir", late)
    assert found(plain.dataset, text) == plain.occurrences(text)
    assert [file.name for file in tmp_path.rglob("*.lock")] == [".tantivy-meta.lock"]


def test_awkward_texts_are_found_where_they_are_stored(weighted):
    whole = [text for text in AWKWARD if weighted.occurrences(text)]
    for text in (
        samples(weighted.texts(), 30, 700, 1) + whole + ["aaa", "anana", "漢字の", "の文章、", "🦙🦙 x", "b ab"]
    ):
        assert found(weighted.dataset, text) == weighted.occurrences(text), repr(text)


def test_entries_and_context_are_those_of_the_raw_document(plain, prepare_recipe):
    for occurrence in trace(plain.dataset, "the ", 40).occurrences:
        source = prepare_recipe.sources[occurrence.source]
        files = {file.name: file for file in source_files(source, occurrence.source)}
        raw = list(read_piece(Piece(str(files[occurrence.file]), 0), Reading()))
        document = next(document for document in raw if document.line == occurrence.line)
        assert occurrence.before + occurrence.text + occurrence.after in " " + document.text
        assert len(occurrence.before) <= 60 >= len(occurrence.after)
        entry = plain.dataset.ledger.entry(plain.dataset.source_names.index(occurrence.source), occurrence.document)
        assert (entry.file, entry.line, entry.digest) == (occurrence.file, occurrence.line, occurrence.digest)


def test_a_text_across_sequences_has_a_part_in_each(plain):
    length, crossed = plain.dataset.sequence_length, 0
    (pieces, _), start = plain.documents["books", 0], 0
    for border in range(length, len(pieces) - length, 5 * length):
        text = b"".join(pieces[border - 6 : border + 6]).decode(errors="ignore")
        (first, *_) = trace(plain.dataset, text).occurrences
        assert [part.sequence for part in first.parts] == [(start + border) // length - 1, (start + border) // length]
        assert first.parts[0].end == length
        assert first.parts[1].start == 0
        crossed += 1
    assert crossed >= 3


@pytest.mark.parametrize("seed", [7, 3])
def test_steps_are_those_whose_batches_hold_the_rows(plain, seed):
    dataset, batch_size = plain.dataset, 13
    steps = 5 * dataset.size // (2 * batch_size)
    occurrences = [o for text in ("the", "ing ", "def") for o in trace(dataset, text, 15).occurrences]
    rows = sorted({row for occurrence in occurrences for row in occurrence.rows})
    seen = steps_of_rows(dataset, rows, seed, batch_size, steps)
    trained: dict[int, list[int]] = {row: [] for row in rows}
    for step in range(1, steps + 1):
        batch = dataset.batch(seed, step - 1, batch_size)
        for row in set(batch.rows.tolist()) & set(rows):
            trained[row].append(step)
    assert seen == trained
    assert {len(of_row) for of_row in seen.values()} <= {2, 3}
    assert steps_of_rows(dataset, rows[:3], seed, 2 * dataset.size, 2) == {row: [1, 2] for row in rows[:3]}
    one = next(occurrence for occurrence in occurrences if len(occurrence.parts) == 1 and occurrence.rows)
    for step in seen[one.rows[0]]:
        batch = dataset.batch(seed, step - 1, batch_size)
        (at,) = np.flatnonzero(batch.rows == one.rows[0])
        assert one.text.encode() in b"".join(dataset.tokenizer.token_bytes[i] for i in batch.ids[at].tolist())


def test_weights_give_two_rows_or_none(weighted):
    rows = {}
    for name in ("twice", "half"):
        occurrences = trace(weighted.dataset, f"{name} marker number", 1000).occurrences
        rows[name] = [len(part.rows) for occurrence in occurrences for part in occurrence.parts if not part.held_out]
    assert set(rows["twice"]) == {2}
    assert set(rows["half"]) == {1}
    assert 0.25 * 400 < len(rows["half"]) < 0.75 * len(rows["twice"])


def test_what_is_held_out_says_so(plain):
    dataset, length = plain.dataset, plain.dataset.sequence_length
    stream = [piece for (source, _), (pieces, _) in plain.documents.items() if source == "code" for piece in pieces]
    (sequence, *_) = dataset.layout.holdout_sequences(dataset.source_names.index("code")).tolist()
    text = b"".join(stream[sequence * length :][10:40]).decode(errors="ignore")
    parts = [part for occurrence in trace(dataset, text).occurrences for part in occurrence.parts]
    held = [part for part in parts if part.held_out]
    assert [(part.sequence, part.rows) for part in held] == [(sequence, ())]


def test_overlaps_of_windows_count_once(weighted):
    """A text of long documents at every place around the borders of the index's windows."""
    for number, (pieces, stored) in ((n, weighted.documents["twice", n]) for n in (len(AWKWARD), len(AWKWARD) + 1)):
        for border in (trace_index.WINDOW - trace_index._OVERLAP, trace_index.WINDOW):
            for start, count in [(border + shift, 25) for shift in (-30, -5, 0, 5)] + [(border - 350, 700)]:
                text = b"".join(pieces[start : start + count]).decode(errors="ignore")
                places = [p for p in found(weighted.dataset, text) if p[:2] == ("twice", number)]
                assert all(stored[start : start + count])
                assert len(places) == 1, (number, start)


def test_beyond_the_limit_the_total_is_counted_or_estimated(plain, monkeypatch):
    expected = len(plain.occurrences("the"))
    hits = trace(plain.dataset, "the", 5)
    assert (len(hits.occurrences), hits.total, hits.exact) == (5, expected, True)
    for module in (trace_module, trace_index):
        monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 10)
    hits = trace(plain.dataset, "the", 5)
    assert (len(hits.occurrences), hits.exact) == (5, False)
    assert expected / 3 < hits.total < expected * 3
    assert found(plain.dataset, "which") == plain.occurrences("which")  # page by page


def test_what_cannot_be_looked_for_is_refused_and_what_is_not_there_not_found(plain):
    for text in ("", "ab", "---- ;", "   \n"):
        with pytest.raises(UsageError, match="give 3 characters or more"):
            trace(plain.dataset, text)
    with pytest.raises(UsageError, match="--limit: 0"):
        trace(plain.dataset, "the", 0)
    hits = trace(plain.dataset, "no document says this", 5)
    assert (hits.occurrences, hits.total, hits.exact) == ([], 0, True)


def test_an_index_is_kept_and_one_of_other_data_or_a_broken_one_built_again(data, prepare_recipe, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(data, path)
    dataset, told = Dataset(path), []
    manifest = (path / "manifest.json").read_bytes()
    expected = found(dataset, "which ")
    facts = (path / INDEX_NAME / FACTS_NAME).read_text()
    build_index(dataset, lambda *report: told.append(report))
    assert told == []
    other = tmp_path / "other"
    prepare(dataclasses.replace(prepare_recipe, seed=8), other)
    shutil.copytree(path / INDEX_NAME, other / INDEX_NAME)
    build_index(Dataset(other), lambda *report: told.append(report))
    assert told[-1][1] == told[-1][2] > 0
    assert found(Dataset(other), "which ") == known(prepare_recipe, other).occurrences("which ")
    assert (other / INDEX_NAME / FACTS_NAME).read_text() != facts
    for harm in ("truncate", "remove", "facts"):
        victim = next((path / INDEX_NAME).glob("*.pos"))
        if harm == "truncate":
            victim.write_bytes(victim.read_bytes()[:-9])
        elif harm == "remove":
            victim.unlink()
        else:
            (path / INDEX_NAME / FACTS_NAME).write_text("{")
        assert found(dataset, "which ") == expected
    victim = next((path / INDEX_NAME).glob("*.term"))
    victim.write_bytes(b"x" * victim.stat().st_size)
    with pytest.raises(CorruptDataError, match=r"damaged .*; remove it"):
        trace(dataset, "which ")
    assert (path / "manifest.json").read_bytes() == manifest
    assert sorted(file.name for file in path.iterdir() if file.name.startswith(".")) == []


def test_imported_chunks_are_traced_by_their_lines(data, plain, tmp_path):
    def ignore(*report: object) -> None: ...

    export_amber(Dataset(data), tmp_path / "amber", ignore)
    import_amber(tmp_path / "amber", data / "tokenizer", tmp_path / "data", ignore)
    dataset = Dataset(tmp_path / "data")
    for text in samples(plain.texts(), 10, 12, 3):
        rows = {row for occurrence in trace(dataset, text, 1000).occurrences for row in occurrence.rows}
        whole = {
            row
            for occurrence in trace(plain.dataset, text, 1000).occurrences
            for row in occurrence.rows
            if len(occurrence.parts) == 1
        }
        assert rows == whole


def test_a_run_tells_its_own_steps_and_data_need_a_batch_size(plain, recipe_file, tmp_path, capsys):
    dataset, run = plain.dataset, tmp_path / "run"
    run.mkdir()
    text = recipe_file.read_text().replace("data: ", f"data: {dataset.path} # ")
    (run / "recipe.yaml").write_text(text)
    shutil.copy(dataset.path / "manifest.json", run / "data-manifest.json")
    row = trace(dataset, "the ").occurrences[0].rows[0]
    show_trace(run, "the ", 3, None, None, 1, True)
    printed = capsys.readouterr()
    first, *_ = lines = [json.loads(line) for line in printed.out.splitlines()]
    expected = steps_of_rows(dataset, [row], 7, 8, 12)[row]
    assert first["parts"][0]["rows"][0] == {"row": row, "steps": expected}
    assert len(lines) == 3
    assert "showing 3 of" in printed.err
    show_trace(dataset.path, "the ", 1, None, None, 2, False)
    printed = capsys.readouterr()
    later = steps_of_rows(dataset, [row], 7, 1, 2 * dataset.size)[row]
    assert f"row {row}, positions {', '.join(f'{step - 1:,}' for step in later)}" in printed.out
    assert "--batch-size" in printed.err
    show_trace(dataset.path, "the ", 1, 3, 10, 1, False)
    steps = steps_of_rows(dataset, [row], 3, 10, -(-dataset.size // 10))[row]
    assert f"row {row}, step {steps[0]}" in capsys.readouterr().out
    show_trace(dataset.path, "no document says this", 1, None, None, 1, False)
    assert "no document that is stored holds" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--epochs: 0"):
        show_trace(dataset.path, "the ", 1, None, None, 0, False)
    (run / "data-manifest.json").write_text('{"digest": "another"}')
    with pytest.raises(UsageError, match="is not the data"):
        show_trace(run, "the ", 1, None, None, 1, False)
