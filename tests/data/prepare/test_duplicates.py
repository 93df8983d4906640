from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashDedupSignature

from mobillama.data.dataset import Dataset
from mobillama.data.prepare.clean import SpacedWords
from mobillama.data.prepare.duplicates import MINHASH, Signature, _clusters
from mobillama.data.prepare.pipeline import prepare
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
