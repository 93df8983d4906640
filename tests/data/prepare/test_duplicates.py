from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature

from mobillama.data.dataset import Dataset
from mobillama.data.prepare import duplicates
from mobillama.data.prepare.clean import SpacedWords
from mobillama.data.prepare.duplicates import MINHASH, NearPairs, Signature, _clusters, signature_step
from mobillama.data.prepare.pipeline import prepare
from mobillama.data.prepare.read import RECORD, records_path
from mobillama.recipe import CleanConfig, SourceConfig

WORDS = ["river", "bends", "slowly", "past", "old", "mill", "children", "fish", "quiet", "mornings", "trains", "late"]


def document(seed: int, count: int = 120) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) + str(generator.randrange(40)) for _ in range(count))


def nearly(text: str) -> str:
    """The same text but for one word of 120."""
    words = text.split()
    return " ".join([*words[:60], "changed", *words[61:]])


@pytest.fixture
def sources(tmp_path):
    """Duplicates of every kind: within a source, across sources, of a dropped one, by clean text only."""
    texts = [document(n) for n in range(20)]
    rows = {
        "a": [*texts[:10], texts[3], nearly(texts[4]), "\ufeff" + texts[5]],
        "b": [nearly(texts[0]), texts[1], *texts[10:], nearly(nearly(texts[4]))],
        "c": [texts[2], nearly(texts[2])],
    }
    for name, documents in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    both = CleanConfig(repair=True, exact_duplicates=True, near_duplicates=True)
    return {
        "a": SourceConfig(str(tmp_path / "a.jsonl"), clean=both),
        "b": SourceConfig(str(tmp_path / "b.jsonl"), clean=both),
        "c": SourceConfig(str(tmp_path / "c.jsonl")),
    }


def test_the_first_of_each_cluster_is_kept_and_the_ledger_names_it(prepare_recipe, sources, tmp_path):
    recipe = dataclasses.replace(prepare_recipe, sources=sources, chunks=2)
    prepare(recipe, tmp_path / "out")
    entries = list(Dataset(tmp_path / "out").ledger.entries())
    found = {(e.source, e.document): (e.verdict, e.duplicate_of) for e in entries if e.verdict != "kept"}
    assert found == {
        ("a", 10): ("exact_duplicate", ("a", 3)),
        ("a", 11): ("near_duplicate", ("a", 4)),
        ("a", 12): ("exact_duplicate", ("a", 5)),
        ("b", 0): ("near_duplicate", ("a", 0)),
        ("b", 1): ("exact_duplicate", ("a", 1)),
        ("b", 12): ("exact_duplicate", ("a", 4)),
    }
    assert all((e.tokens == 0) == (e.verdict != "kept") for e in entries)


def test_only_equal_documents_are_dropped_where_only_those_are_looked_for(prepare_recipe, sources, tmp_path):
    exact = CleanConfig(exact_duplicates=True)
    sources = {name: dataclasses.replace(source, clean=exact) for name, source in sources.items()}
    prepare(dataclasses.replace(prepare_recipe, sources=sources, chunks=2), tmp_path / "out")
    entries = Dataset(tmp_path / "out").ledger.entries()
    found = {(e.source, e.document): e.duplicate_of for e in entries if e.verdict != "kept"}
    assert found == {("a", 10): ("a", 3), ("b", 1): ("a", 1), ("b", 12): ("a", 11), ("c", 0): ("a", 2)}


@pytest.mark.parametrize("seed", range(20))
def test_clusters_equal_a_plain_search(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 200))
    pairs = generator.integers(0, size, (int(generator.integers(0, 2 * size)), 2)) * 7
    neighbours: dict[int, set[int]] = {}
    for one, other in pairs.tolist():
        neighbours.setdefault(one, set()).add(other)
        neighbours.setdefault(other, set()).add(one)
    expected, seen = {}, set()
    for start in sorted(neighbours):
        waiting = [] if start in seen else [start]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node != start:
                expected[node] = start
            waiting += neighbours[node]
    found = _clusters(pairs, np.array(sorted(expected)[::2], dtype=np.int64))
    assert dict(zip(found["document"].tolist(), found["of"].tolist(), strict=True)) == expected
    assert found["document"].tolist() == sorted(expected)
    assert found["document"][found["exact"]].tolist() == sorted(expected)[::2]


@pytest.mark.parametrize("words", [5, 260, 261, 5000])
def test_signatures_are_datatroves(tmp_path, words):
    ours = Signature(str(tmp_path), MINHASH, language=SpacedWords())
    theirs = MinhashDedupSignature(str(tmp_path), MINHASH, language=SpacedWords())
    shingles = theirs.get_shingles(document(words, words))
    assert ours.get_signature(shingles) == theirs.get_signature(shingles)


@pytest.mark.parametrize("per_partition", [1, 7, 1000])
def test_near_pairs_are_datatroves_whatever_the_partitions(tmp_path, monkeypatch, per_partition):
    """Task 1 has no document, task 2 has dropped ones, which have no signature."""
    monkeypatch.setattr(NearPairs, "per_partition", per_partition)
    monkeypatch.setattr(duplicates, "_SAMPLED", 3)
    originals = [document(seed, 60) for seed in range(30)]
    texts = [originals, [], [nearly(text) for text in originals[::2]] + originals[1:9]]
    dropped = [[], [], [0, 5, 6]]
    for task, documents in enumerate(texts):
        records = np.zeros(len(documents), RECORD)
        records["verdict"][dropped[task]] = 1
        records_path(tmp_path, task).parent.mkdir(exist_ok=True)
        records.tofile(records_path(tmp_path, task))
        handed_on = (Document(text, "") for i, text in enumerate(documents) if i not in dropped[task])
        signature_step(tmp_path).run(handed_on, task, 3)
    starts = np.cumsum([0, *map(len, texts)])
    step = NearPairs(tmp_path, [0, 1, 2], starts, sum(map(len, texts)))
    for rank in range(step.size):
        list(step.run(None, rank, step.size))
    ours = np.concatenate([np.load(step.path(rank)) for rank in range(step.size)])
    for rank in range(MINHASH.num_buckets):
        MinhashDedupBuckets(str(tmp_path / "signatures"), str(tmp_path / "theirs"), config=MINHASH).run(
            None, rank, MINHASH.num_buckets
        )
    rows = [np.fromfile(path, "<u4").reshape(-1, 4) for path in sorted((tmp_path / "theirs").glob("*.dups"))]
    theirs = np.concatenate(rows).astype(np.int64)
    pairs = step.numbered(theirs[:, 0::2] << 32 | theirs[:, 1::2])
    nothing = np.empty(0, np.int64)
    assert len(_clusters(pairs, nothing)) > 15
    assert np.array_equal(_clusters(ours, nothing), _clusters(pairs, nothing))


def test_many_partitions_give_the_same_data_set(prepare_recipe, sources, tmp_path, monkeypatch):
    recipe = dataclasses.replace(prepare_recipe, sources=sources, chunks=2)
    whole = prepare(recipe, tmp_path / "whole")
    monkeypatch.setattr(duplicates.ExactPairs, "per_partition", 3)
    monkeypatch.setattr(NearPairs, "per_partition", 3)
    monkeypatch.setattr(duplicates, "_SAMPLED", 3)
    assert prepare(recipe, tmp_path / "divided") == whole
