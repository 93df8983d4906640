"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobillama.errors import DivergedError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 0.95
    """Draw among the fewest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Draw among tokens at least this share as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Divide the positive logits, and multiply the negative ones, of tokens seen before (Keskar et al. 2019,
    arXiv:1909.05858, section 4.1); 1: leave them."""

    def __post_init__(self) -> None:
        """Refuse what is out of range; each condition is false for NaN too.

        Raises:
            UsageError: naming the field.
        """
        if not 0 <= self.temperature <= _MOST:
            raise UsageError(f"temperature: {self.temperature} is not from 0 to {_MOST:g}; 0 takes the likeliest token")
        if self.top_k < 0:
            raise UsageError(f"top-k: {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p: {self.top_p} is not above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p: {self.min_p} is not from 0 to 1")
        if not 0 < self.repetition_penalty <= _MOST:
            raise UsageError(f"repetition-penalty: {self.repetition_penalty} is not above 0 and at most {_MOST:g}")


_MOST, _LEAST, _BLOCK = 100.0, 1e-30, 256


def sample(
    logits_v: NDArray[np.float32], sampling: Sampling, random: np.random.Generator, seen: Sequence[int] = ()
) -> int:
    """Return the id of the next token: penalty, temperature, top-k, top-p of what is left, then min-p.

    Args:
        logits_v: (vocabulary,).
        sampling: how to draw.
        random: what to draw with; untouched at temperature 0.
        seen: the prompt's and the answer's tokens so far, for the penalty.

    Raises:
        DivergedError: the logits hold NaN, or none is finite.
    """
    if sampling.repetition_penalty != 1 and len(seen):
        logits_v = _penalised(logits_v, sampling.repetition_penalty, seen)
    most = logits_v.max()
    if not np.isfinite(most):
        raise DivergedError(f"the model gives {most} as its largest logit; take another checkpoint")
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    # Before the division, which a tiny temperature makes infinite.
    weights = logits_v - most
    weights /= np.float32(max(sampling.temperature, _LEAST))
    np.exp(weights, out=weights)
    ids = None  # all
    if 0 < sampling.top_k < len(weights):
        ids = np.flatnonzero(weights >= np.partition(weights, -sampling.top_k)[-sampling.top_k])
        ids = ids[np.argsort(-logits_v[ids], kind="stable")[: sampling.top_k]]
        weights = weights[ids]
    if sampling.top_p < 1:
        total = weights.sum(dtype=np.float64)
        # All tokens below the last level have 1 - top_p together at most, so the nucleus is among the others. As a rule it is
        # among those above a higher one, and few are sorted.
        for level in (0.01, 0.0001, (1 - sampling.top_p) * total / len(weights)):
            likely = np.flatnonzero(weights >= level)
            if weights[likely].sum(dtype=np.float64) > sampling.top_p * total:
                break
        ranked = likely[np.argsort(-weights[likely], kind="stable")]
        kept = int(np.searchsorted(np.cumsum(weights[ranked], dtype=np.float64), sampling.top_p * total)) + 1
        ids, weights = ranked[:kept] if ids is None else ids[ranked[:kept]], weights[ranked[:kept]]
    if sampling.min_p > 0:
        likely = np.flatnonzero(weights >= sampling.min_p)  # the likeliest token's weight is 1
        ids, weights = likely if ids is None else ids[likely], weights[likely]
    place = _place(weights, random.random())
    return place if ids is None else int(ids[place])


def _place(weights: NDArray[np.float32], share: float) -> int:
    """Return the first place up to which the weights add up to more than a share of their sum.

    In two stages, since a running sum over a whole vocabulary takes as long as a small model takes for a token.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    wanted = share * ends[-1]
    block = min(int(np.searchsorted(ends, wanted, side="right")), len(ends) - 1)
    within = weights[block * _BLOCK : (block + 1) * _BLOCK]
    sums = np.cumsum(within, dtype=np.float64) + (ends[block - 1] if block else 0)
    return block * _BLOCK + min(int(np.searchsorted(sums, wanted, side="right")), len(within) - 1)


def _penalised(logits_v: NDArray[np.float32], penalty: float, seen: Sequence[int]) -> NDArray[np.float32]:
    ids = np.unique(np.asarray(seen))
    changed_v = logits_v.copy()
    held = changed_v[ids]
    changed_v[ids] = np.where(held > 0, held / penalty, held * penalty)
    return changed_v


def log_probabilities(logits_v: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logarithm of the softmax of logits (vocabulary,)."""
    shifted = logits_v.astype(np.float64) - logits_v.max()
    return shifted - np.log(np.exp(shifted).sum())
