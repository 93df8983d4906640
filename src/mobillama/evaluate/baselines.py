"""Yardsticks in bits per byte on the same held-out bytes: gzip, xz, a byte 3-gram and a Kneser-Ney token 3-gram."""

from __future__ import annotations

import gzip
import lzma
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def gzip_bits_per_byte(text: bytes) -> float:
    """Return the size that ``gzip -9`` makes of ``text``, in bits per byte."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """Return the size that ``xz -9`` makes of ``text``, in bits per byte."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def byte_trigram_bits_per_byte(train: bytes, text: bytes) -> float:
    """Return the cross-entropy of a byte 3-gram in bits per byte.

    Witten-Bell interpolation (1991): each order hands the share types/(types + count) of its mass to the next lower one,
    the lowest to the uniform distribution over 256 bytes.
    """
    seen, asked = (np.frombuffer(data, np.uint8).astype(np.int64) for data in (train, text))
    probability = np.full(len(asked), 1 / 256)
    for order in (1, 2, 3):
        keys, queries = _byte_keys(seen, order), _byte_keys(asked, order)
        counts = np.bincount(keys, minlength=256**order)
        by_context = counts.reshape(-1, 256)
        totals, types = by_context.sum(1), (by_context > 0).sum(1)
        context = queries // 256
        scored = probability[order - 1 :]
        total, kinds = totals[context], types[context]
        mixed = (counts[queries] + kinds * scored) / np.maximum(total + kinds, 1)
        probability[order - 1 :] = np.where(total > 0, mixed, scored)
    return float(-np.log2(probability).mean())


def _byte_keys(data: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    keys = data[order - 1 :].copy()
    for back in range(1, order):
        keys += data[order - 1 - back : len(data) - back] << (8 * back)
    return keys


@dataclass(frozen=True)
class _Level:
    """One order of the model: discounted counts by n-gram, and each context's total and left-over mass."""

    grams: NDArray[np.int64]
    discounted: NDArray[np.float64]
    contexts: NDArray[np.int64]
    totals: NDArray[np.float64]
    leftover: NDArray[np.float64]

    def interpolate(
        self, gram: NDArray[np.int64], context: NDArray[np.int64], lower: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return probabilities of ``gram`` given the next lower order's."""
        at, found = _find(self.contexts, context)
        gram_at, gram_found = _find(self.grams, gram)
        own = np.where(gram_found, self.discounted[gram_at], 0.0)
        return np.where(found, (own + self.leftover[at] * lower) / self.totals[at], lower)


class KneserNeyTrigram:
    """Interpolated modified Kneser-Ney 3-gram over token ids (Chen and Goodman 1999, section 4.1).

    Args:
        sequences: (n, length) ids; n-grams do not cross rows.
        vocab_size: number of ids.
    """

    def __init__(self, sequences: NDArray[np.int64], vocab_size: int) -> None:
        self.vocab_size = size = vocab_size
        trigrams, counts = np.unique(_grams(sequences, 3, size), return_counts=True)
        # Lower orders count the different words before an n-gram, not its occurrences.
        bigrams, before_bigram = np.unique(trigrams % (size * size), return_counts=True)
        unigrams, before_unigram = np.unique(bigrams % size, return_counts=True)
        self._levels = [
            _level(unigrams, before_unigram, np.zeros_like(unigrams)),
            _level(bigrams, before_bigram, bigrams // size),
            _level(trigrams, counts, trigrams // size),
        ]

    def nats(self, sequences: NDArray[np.int64]) -> float:
        """Return the negative log-likelihood of all ids but each row's first; the second sees one id of context."""
        total = 0.0
        for first, order in ((sequences[:, :2], 2), (sequences, 3)):
            grams = _grams(first, order, self.vocab_size)
            probability = np.full(grams.shape, 1 / self.vocab_size)
            for level_order, level in enumerate(self._levels[:order], 1):
                gram = grams % self.vocab_size**level_order
                probability = level.interpolate(gram, gram // self.vocab_size, probability)
            total -= float(np.log(probability).sum())
        return total

    def bits_per_byte(self, sequences: NDArray[np.int64], scored_bytes: int) -> float:
        """Return the cross-entropy of held-out sequences in bits per byte of their scored text."""
        return self.nats(sequences) / math.log(2) / scored_bytes


def _grams(sequences: NDArray[np.int64], order: int, size: int) -> NDArray[np.int64]:
    """Return the n-grams of each row as numbers in base ``size``, oldest id first."""
    length = sequences.shape[1]
    grams = np.zeros((len(sequences), max(0, length - order + 1)), dtype=np.int64)
    for offset in range(order):
        grams = grams * size + sequences[:, offset : length - order + 1 + offset]
    return grams.ravel()


def _level(grams: NDArray[np.int64], counts: NDArray[np.int64], contexts: NDArray[np.int64]) -> _Level:
    ones, twos, threes, fours = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
    base = ones / (ones + 2 * twos)
    discounts = np.array([0.0, 1 - 2 * base * twos / ones, 2 - 3 * base * threes / twos, 3 - 4 * base * fours / threes])
    discounts = np.clip(discounts, 0.0, [0.0, 1.0, 2.0, 3.0])
    discount = discounts[np.minimum(counts, 3)]
    groups, group_of = np.unique(contexts, return_inverse=True)
    return _Level(
        grams=grams,
        discounted=counts - discount,
        contexts=groups,
        totals=np.bincount(group_of, weights=counts).astype(np.float64),
        leftover=np.bincount(group_of, weights=discount).astype(np.float64),
    )


def _find(haystack: NDArray[np.int64], needles: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where needles stand in a sorted array, and whether they do."""
    at = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return at, haystack[at] == needles
