"""Order is arithmetic: a keyed permutation of 0…n-1 that can be evaluated, and inverted, at any single index.

It depends on a root digest, a seed and the index alone: not on world size, workers, restarts, or any library's random
stream. The construction is fixed for good; golden vectors in the tests hold it.

A Feistel network of :data:`ROUNDS` rounds permutes ``bits``-bit numbers, ``bits`` the fewest with 2**bits >= n. The low
half (bits // 2 wide) and the high half are changed in turn, the low one first: ``half ^= mix(other half + key[round])``
cut to the half's width, where ``mix`` is splitmix64's finaliser. Outputs of n or more go through the network again until
they fall below n (cycle walking). ``key[round]`` is the first eight bytes, little-endian, of
``sha256(label ‖ round as one byte)``.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8

_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A bijection of 0…size-1 chosen by ``label``; vectorised in both directions.

    Args:
        label: any bytes; another label is another permutation.
        size: number of elements, at most 2**62.
    """

    def __init__(self, label: bytes, size: int) -> None:
        if not 0 < size <= 1 << 62:
            raise ValueError(f"a permutation of {size} elements is not possible")
        self.size = size
        bits = max(1, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        digests = (hashlib.sha256(label + bytes([number])).digest() for number in range(ROUNDS))
        self._keys = [np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests]

    def __call__(self, index: ArrayLike) -> NDArray[np.int64]:
        """Return the element at each index."""
        return self._walk(index, range(ROUNDS))

    def inverse(self, element: ArrayLike) -> NDArray[np.int64]:
        """Return the index of each element."""
        return self._walk(element, range(ROUNDS - 1, -1, -1))

    def _walk(self, values: ArrayLike, rounds: range) -> NDArray[np.int64]:
        given = np.atleast_1d(np.asarray(values))
        if given.size and (given.min() < 0 or given.max() >= self.size):
            raise IndexError(f"index outside 0…{self.size - 1}")
        out = self._network(given.astype(np.uint64), rounds)
        outside = np.flatnonzero(out >= self.size)
        while outside.size:
            walked = self._network(out[outside], rounds)
            out[outside] = walked
            outside = outside[walked >= self.size]
        return out.astype(np.int64)

    def _network(self, values: NDArray[np.uint64], rounds: range) -> NDArray[np.uint64]:
        low = values & self._low_mask
        high = values >> self._low_bits
        for number in rounds:
            if number % 2 == 0:
                low ^= _mix(high + self._keys[number]) & self._low_mask
            else:
                high ^= _mix(low + self._keys[number]) & self._high_mask
        return (high << self._low_bits) | low


def order(root: bytes, seed: int, size: int, index: ArrayLike) -> NDArray[np.int64]:
    """Return the stored row trained at each position of an endless run.

    Position ``index`` is the ``index % size``-th of epoch ``index // size``; each epoch is another permutation of all
    rows. ``root`` is the data's Merkle root (32 bytes), so that other data give another order.
    """
    positions = np.atleast_1d(np.asarray(index, dtype=np.int64))
    rows = np.empty_like(positions)
    epochs = positions // size
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = epoch_permutation(root, seed, size, int(epoch))(positions[chosen] % size)
    return rows


def epoch_permutation(root: bytes, seed: int, size: int, epoch: int) -> Permutation:
    """Return the permutation of one epoch, labelled ``root ‖ "/train/" ‖ seed ‖ "/" ‖ epoch``."""
    return Permutation(root + f"/train/{seed}/{epoch}".encode(), size)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values ^ (values >> np.uint64(30))
    values *= _MULTIPLIER_1
    values ^= values >> np.uint64(27)
    values *= _MULTIPLIER_2
    return values ^ (values >> np.uint64(31))
