"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobillama.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 0.95
    """Draw among the fewest tokens that hold this share of the probability."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature: {self.temperature} is negative; 0 takes the likeliest token")
        if self.top_k < 0:
            raise UsageError(f"top-k: {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p: {self.top_p} is not above 0 and at most 1")


def sample(logits_v: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """Return the id of the next token: temperature first, then top-k, then top-p of what is left."""
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    scaled = logits_v.astype(np.float64) / sampling.temperature
    ids = np.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        ids = np.flatnonzero(scaled >= np.partition(scaled, -sampling.top_k)[-sampling.top_k])
        ids = ids[np.argsort(-scaled[ids], kind="stable")[: sampling.top_k]]
    weights = np.exp(scaled[ids] - scaled[ids].max())
    total = weights.sum()
    # All tokens below this share have 1 - top_p together at most, so the nucleus is among the others: few are sorted.
    likely = weights * len(ids) >= (1 - sampling.top_p) * total
    ids, weights = ids[likely], weights[likely]
    ranked = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[ranked]) / total
    kept = min(int(np.searchsorted(cumulative, sampling.top_p)) + 1, len(ranked))
    drawn = random.random() * cumulative[kept - 1]
    return int(ids[ranked[min(int(np.searchsorted(cumulative, drawn, side="right")), kept - 1)]])
