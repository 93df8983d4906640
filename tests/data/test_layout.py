from __future__ import annotations

import numpy as np
import pytest

from mobillama.data.layout import Layout, SourceCount

ROOT = b"r" * 32
SOURCES = [
    SourceCount("once", 50, 5, 45),
    SourceCount("half", 40, 0, 20),
    SourceCount("thrice", 11, 1, 30),
    SourceCount("and-a-half", 21, 1, 30),
    SourceCount("none-held", 7, 0, 7),
]
GOLDEN = [(1, 0), (4, 5), (0, 28), (3, 8), (3, 11), (2, 6), (0, 44), (2, 3)]
GOLDEN_HOLDOUT = [25, 12, 49, 15, 36]


def test_every_row_has_an_origin_and_every_sequence_its_rows():
    layout = Layout(ROOT, 3, SOURCES)
    source, sequence = layout.train_origin(np.arange(layout.train_size))
    assert np.array_equal(layout.source_of(np.arange(layout.train_size)), source)
    for index, count in enumerate(SOURCES):
        assert (source == index).sum() == count.dealt
        held = set(layout.holdout_sequences(index).tolist())
        assert len(held) == count.holdout
        rows = layout.train_rows(index, np.arange(count.sequences))
        for number in range(count.sequences):
            mine = np.flatnonzero((source == index) & (sequence == number)).tolist()
            assert sorted(rows[number][rows[number] >= 0].tolist()) == mine
            times = 0 if number in held else count.dealt / count.trainable
            assert len(mine) in (int(times), -int(-times // 1))


def test_destinations_cover_every_row_and_every_held_out_place_once():
    layout = Layout(ROOT, 3, SOURCES)
    rows, origins = [], []
    for index, count in enumerate(SOURCES):
        for start in range(0, count.sequences, 8):
            end = min(start + 8, count.sequences)
            within, row = layout.destinations(index, start, end)
            rows += row.tolist()
            origins += [(index, start + number) for number in within.tolist()]
    total = layout.train_size + sum(count.holdout for count in SOURCES)
    assert sorted(rows) == list(range(total))
    origin_of = dict(zip(rows, origins, strict=True))
    source, sequence = layout.train_origin(np.arange(layout.train_size))
    assert [origin_of[row] for row in range(layout.train_size)] == list(
        zip(source.tolist(), sequence.tolist(), strict=True)
    )
    for index, count in enumerate(SOURCES):
        first = layout.holdout_starts[index]
        held = [origin_of[first + place][1] for place in range(count.holdout)]
        assert held == layout.holdout_sequences(index).tolist()


def test_the_arithmetic_is_fixed_for_good():
    """Golden values: a change here would give every prepared data set another order."""
    layout = Layout(ROOT, 3, SOURCES)
    source, sequence = layout.train_origin(np.arange(8))
    assert list(zip(source.tolist(), sequence.tolist(), strict=True)) == GOLDEN
    assert layout.holdout_sequences(0).tolist() == GOLDEN_HOLDOUT


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_is_another_order_and_another_hold_out(seed):
    one, other = Layout(ROOT, 0, SOURCES), Layout(ROOT, seed, SOURCES)
    assert not np.array_equal(one.train_origin(np.arange(50)), other.train_origin(np.arange(50)))
    assert not np.array_equal(one.holdout_sequences(0), other.holdout_sequences(0))
