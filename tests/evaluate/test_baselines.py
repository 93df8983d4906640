from __future__ import annotations

import subprocess
from collections import Counter, defaultdict
from math import log2

import numpy as np
import pytest

from mobillama.data.dataset import Dataset
from mobillama.evaluate.baselines import (
    KneserNeyTrigram,
    byte_trigram_bits_per_byte,
    gzip_bits_per_byte,
    xz_bits_per_byte,
)
from mobillama.evaluate.heldout import evaluate_baselines

TEXT = (b"It is a truth universally acknowledged, that a single man in possession of a good fortune, " * 3)[:250]
OTHER = b"However little known the feelings or views of such a man may be, this truth is so well fixed."


def test_compressors_equal_the_command_line_tools(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT * 40 + OTHER)
    size = path.stat().st_size
    for command, ours in ((["gzip", "-9nc"], gzip_bits_per_byte), (["xz", "-9c"], xz_bits_per_byte)):
        theirs = len(subprocess.run([*command, path], capture_output=True, check=True).stdout)
        assert ours(path.read_bytes()) == pytest.approx(8 * theirs / size, rel=0.01)


def test_byte_trigram_equals_witten_bell_written_out():
    def probability(context: bytes, byte: int) -> float:
        order = len(context)
        lower = 1 / 256 if order == 0 else probability(context[1:], byte)
        following = [TEXT[i + order] for i in range(len(TEXT) - order) if TEXT[i : i + order] == context]
        if not following:
            return lower
        kinds = len(set(following))
        return (following.count(byte) + kinds * lower) / (len(following) + kinds)

    bits = [-log2(probability(OTHER[max(0, i - 2) : i], OTHER[i])) for i in range(len(OTHER))]
    assert byte_trigram_bits_per_byte(TEXT, OTHER) == pytest.approx(sum(bits) / len(OTHER), rel=1e-9)


def kneser_ney_by_hand(rows: list[list[int]], vocab: int):
    """Interpolated modified Kneser-Ney with dictionaries, as Chen and Goodman write it."""
    trigrams = Counter(tuple(row[i : i + 3]) for row in rows for i in range(len(row) - 2))
    bigrams = Counter(gram[1:] for gram in trigrams)
    unigrams = Counter(gram[1:] for gram in bigrams)
    levels = [unigrams, bigrams, trigrams]
    discounts = []
    for counts in levels:
        n = [max(1, sum(c == k for c in counts.values())) for k in (1, 2, 3, 4)]
        base = n[0] / (n[0] + 2 * n[1])
        found = [0.0] + [k - (k + 1) * base * n[k] / n[k - 1] for k in (1, 2, 3)]
        discounts.append([min(max(d, 0.0), k) for k, d in enumerate(found)])
    after = [defaultdict(dict) for _ in levels]
    for level, counts in enumerate(levels):
        for gram, count in counts.items():
            after[level][gram[:-1]][gram[-1]] = count

    def probability(context: tuple[int, ...], word: int) -> float:
        level = len(context)
        lower = 1 / vocab if level == 0 else probability(context[1:], word)
        following = after[level].get(context)
        if not following:
            return lower
        discount = [discounts[level][min(3, c)] for c in following.values()]
        count = following.get(word, 0)
        own = count - discounts[level][min(3, count)]
        return (own + sum(discount) * lower) / sum(following.values())

    return probability


def test_kneser_ney_equals_dictionaries_and_sums_to_one():
    random = np.random.default_rng(0)
    rows = (random.zipf(1.5, (30, 25)) % 17).astype(np.int64)
    held = (random.zipf(1.5, (6, 25)) % 17).astype(np.int64)
    model, probability = KneserNeyTrigram(rows, 17), kneser_ney_by_hand(rows.tolist(), 17)
    nats = -sum(
        np.log(probability(tuple(row[max(0, i - 2) : i]), row[i])) for row in held.tolist() for i in range(1, len(row))
    )
    assert model.nats(held) == pytest.approx(nats, rel=1e-9)
    for context in ([3, 1], [0, 16], [16, 16]):
        every = np.array([[*context, word] for word in range(17)])
        both = [np.exp(-model.nats(row[None])) for row in every]
        second = np.exp(-model.nats(every[:1, :2]))
        assert sum(both) / second == pytest.approx(1.0)


def test_baselines_of_a_data_set_are_in_their_usual_order(data):
    found = evaluate_baselines(Dataset(data))
    assert found["Kneser-Ney token 3-gram"] < found["byte 3-gram"] < 5
    assert 1 < found["xz -9"] < 5
    assert 1 < found["gzip -9"] < 5
