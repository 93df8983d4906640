from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobillama.data.order import Permutation, order

ROOT = hashlib.sha256(b"golden").digest()
GOLDEN_10 = [4, 0, 1, 7, 3, 6, 8, 2, 9, 5]
GOLDEN_LARGE = [555264718, 527813067, 62446436, 372375603]
GOLDEN_ORDER = [345, 493, 718, 619, 912, 519]
GOLDEN_OTHER_SEED = [150, 520, 3, 257, 358, 833]


def test_golden_vectors():
    """These numbers are the format: a change of any of them breaks every prepared data set and every run."""
    assert Permutation(b"mobillama", 10)(np.arange(10)).tolist() == GOLDEN_10
    assert Permutation(b"mobillama", 614_511_360)([0, 1, 2, 614_511_359]).tolist() == GOLDEN_LARGE
    assert order(ROOT, 0, 1000, [0, 1, 999, 1000, 1001, 123_456_789]).tolist() == GOLDEN_ORDER
    assert order(ROOT, 1, 1000, [0, 1, 999, 1000, 1001, 123_456_789]).tolist() == GOLDEN_OTHER_SEED


def feistel_by_hand(label: bytes, size: int, index: int) -> int:
    """The documented construction in plain Python integers, one number at a time."""
    mask64 = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask64
        return z ^ (z >> 31)

    bits = max(1, (size - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    value = index
    while True:
        low, high = value % (1 << low_bits), value >> low_bits
        for number in range(8):
            key = int.from_bytes(hashlib.sha256(label + bytes([number])).digest()[:8], "little")
            if number % 2 == 0:
                low ^= mix((high + key) & mask64) % (1 << low_bits)
            else:
                high ^= mix((low + key) & mask64) % (1 << high_bits)
        value = high << low_bits | low
        if value < size:
            return value


@settings(deadline=None)
@given(size=st.integers(1, 3000), label=st.binary(max_size=8))
def test_is_a_bijection_with_its_inverse(size, label):
    permutation = Permutation(label, size)
    out = permutation(np.arange(size))
    assert np.array_equal(np.sort(out), np.arange(size))
    assert np.array_equal(permutation.inverse(out), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(1, 1 << 62), label=st.binary(max_size=8), data=st.data())
def test_equals_an_independent_implementation_at_any_size(size, label, data):
    index = data.draw(st.integers(0, size - 1))
    permutation = Permutation(label, size)
    assert permutation(index).tolist() == [feistel_by_hand(label, size, index)]
    assert permutation.inverse(permutation(index)).tolist() == [index]


def test_indices_outside_are_refused():
    with pytest.raises(IndexError, match="outside 0…9"):
        Permutation(b"", 10)(10)
    with pytest.raises(IndexError):
        Permutation(b"", 10).inverse(-1)
    with pytest.raises(ValueError, match="0 elements"):
        Permutation(b"", 0)


def test_epochs_each_visit_every_row_once_and_differ():
    rows = order(ROOT, 3, 500, np.arange(1500)).reshape(3, 500)
    assert all(np.array_equal(np.sort(epoch), np.arange(500)) for epoch in rows)
    assert len({tuple(epoch[:20]) for epoch in rows}) == 3


def test_positions_are_spread_evenly():
    """Chi-square over 16×16 cells of (position, element): a shuffle that keeps neighbours near fails."""
    size = 1 << 16
    cells = np.histogram2d(np.arange(size), Permutation(b"x", size)(np.arange(size)), bins=16)[0]
    expected = size / 256
    chi_square = float(((cells - expected) ** 2 / expected).sum())
    assert 150 < chi_square < 320  # 225 degrees of freedom, five standard deviations
