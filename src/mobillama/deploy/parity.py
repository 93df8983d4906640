"""The one check that follows every export: does the copy compute what the model computes, on real text?

Two functions from ids to logits are compared, teacher-forced, on passages of the packaged sample corpus: how far logits are
apart, the Kullback-Leibler divergence of the copy's distribution from the model's, how often both name the same likeliest
token, and what each text costs either in bits per byte.
"""

from __future__ import annotations

import itertools
import json
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.tokenizer import Tokenizer, token_lengths
from mobillama.errors import VerificationError
from mobillama.progress import Show, quiet

Logits = Callable[[Sequence[int]], NDArray[np.float32]]
"""From ids (t) to the logits (t, v) that follow each."""

TOKENS = 1024
_ROW = 256  # tokens of a passage


@dataclass(frozen=True)
class Parity:
    """How far a copy is from its model."""

    tokens: int
    """Predictions compared."""
    max_logit_error: float
    mean_logit_error: float
    kl_nats_per_token: float
    """KL(model ‖ copy), the mean over predictions."""
    top1_agreement: float
    """Share of predictions whose likeliest token is the same."""
    bits_per_byte_model: float
    bits_per_byte_copy: float

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens of real text: same likeliest token {self.top1_agreement:.2%} · "
            f"KL {self.kl_nats_per_token:.2e} nats/token · logit error mean {self.mean_logit_error:.2e}, "
            f"max {self.max_logit_error:.2e} · bits per byte {self.bits_per_byte_model:.4f} → {self.bits_per_byte_copy:.4f}"
        )

    def require(self, place: object, most_kl: float, least_top1: float = 0.0) -> None:
        """Raise a VerificationError if the copy is further from the model than rounding explains."""
        if not (self.kl_nats_per_token <= most_kl and self.top1_agreement >= least_top1):  # a NaN too
            raise VerificationError(
                f"{place}: is {self.kl_nats_per_token:.3g} nats/token from what the same numbers give in torch, where rounding "
                f"explains {most_kl:g}, and has the same likeliest token in {self.top1_agreement:.1%}, where it is to be "
                f"{least_top1:.0%}; nothing was kept: report this"
            )

    def record(self) -> dict[str, float]:
        """Return the figures as plain data."""
        return asdict(self)


def passages(tokenizer: Tokenizer, context: int, tokens: int = TOKENS) -> list[list[int]]:
    """Return ids of real text, passages of the packaged corpus' sources in turn, for ``tokens`` predictions.

    Args:
        tokenizer: the model's.
        context: its context length; the ids of a passage but the last fit it.
        tokens: predictions wanted; a passage of n ids gives n - 1.
    """
    length = min(_ROW, context) + 1
    rows: list[list[int]] = []
    for text in texts():
        (ids,) = tokenizer.encode([text[: 16 * length]])
        missing = tokens - sum(len(row) - 1 for row in rows)
        if missing <= 0:
            return rows
        if len(row := ids[: min(length, missing + 1)]) > 1:
            rows.append(row)
    return rows


def texts() -> Iterator[str]:
    """Yield texts of the sources in turn, each document in pieces, so that few documents give many passages."""
    folder = files("mobillama.data") / "sample"
    sources = sorted(item.name for item in folder.iterdir() if item.name.endswith(".jsonl.xz"))
    for texts in itertools.zip_longest(*(_pieces((folder / name).read_bytes()) for name in sources)):
        yield from (text for text in texts if text)


def _pieces(packed: bytes, characters: int = 5000) -> Iterator[str]:
    for line in lzma.decompress(packed).decode().splitlines():
        text = json.loads(line)["text"]
        yield from (text[start : start + characters] for start in range(0, len(text), characters))


class Comparison:
    """Adds up how far a copy's logits are from the model's, passage by passage.

    Args:
        tokenizer: the model's; logits of ids beyond its own are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._lengths, self._vocabulary = token_lengths(tokenizer), tokenizer.vocab_size
        self._sums = np.zeros(5)  # logit error, KL, agreement, nats of the model, nats of the copy
        self._largest, self._tokens, self._bytes = 0.0, 0, 0

    def add(self, ids: Sequence[int], model_tv: NDArray[np.float32], copy_tv: NDArray[np.float32]) -> None:
        """Take in a passage of ids (t + 1) and the logits (t, v) that follow its first t."""
        for start in range(0, len(ids) - 1, _ROW):  # a part at a time, since float64 of long passages is large
            part = slice(start, start + _ROW)
            self._add(np.array(ids[1:])[part], model_tv[part], copy_tv[part])

    def _add(self, targets: NDArray[np.int64], model_tv: NDArray[np.float32], copy_tv: NDArray[np.float32]) -> None:
        ours_tv, theirs_tv = (logits[:, : self._vocabulary].astype(np.float64) for logits in (model_tv, copy_tv))
        error_tv = np.abs(ours_tv - theirs_tv)
        ours_tv, theirs_tv = _log_softmax(ours_tv), _log_softmax(theirs_tv)
        agree = ours_tv.argmax(-1) == theirs_tv.argmax(-1)
        kl = (np.exp(ours_tv) * (ours_tv - theirs_tv)).sum()
        nats = [-np.take_along_axis(each, targets[:, None], 1).sum() for each in (ours_tv, theirs_tv)]
        self._sums += [error_tv.mean(-1).sum(), kl, agree.sum(), *nats]
        self._largest = float(np.maximum(self._largest, error_tv.max()))
        self._tokens += len(targets)
        self._bytes += int(self._lengths[targets].sum())

    def merge(self, other: Comparison) -> None:
        """Take in what another one added up."""
        self._sums += other._sums
        self._largest = float(np.maximum(self._largest, other._largest))
        self._tokens += other._tokens
        self._bytes += other._bytes

    def result(self) -> Parity:
        """Return the figures of all passages so far."""
        error, kl, agreement, *nats = (float(total) / self._tokens for total in self._sums)
        bits = [each * self._tokens / max(1, self._bytes) / math.log(2) for each in nats]
        return Parity(self._tokens, self._largest, error, kl, agreement, *bits)


def compare(
    model: Logits,
    copy: Logits,
    rows: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    show: Show = quiet,
) -> Parity:
    """Return how far ``copy`` is from ``model`` on passages of ids, from :func:`passages`; ``show`` is told the progress."""
    comparison = Comparison(tokenizer)
    for done, ids in enumerate(rows, 1):
        comparison.add(ids, model(ids[:-1]), copy(ids[:-1]))
        show("compare passages", done, len(rows))
    return comparison.result()


def recorded(logits: Iterable[NDArray[np.float32]]) -> Logits:
    """Return the function that gives logits computed elsewhere: of the first passage when it is first asked, and so on."""
    passages = iter(logits)
    return lambda ids: next(passages)


def _log_softmax(logits_tv: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits_tv - logits_tv.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def torch_logits(forward: Callable[[Any], Any]) -> Logits:
    """Return the function for a torch model, given what maps ids (1, t) to logits (1, t, v)."""
    import torch

    def logits(ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return forward(torch.tensor([list(ids)]))[0].float().cpu().numpy()

    return logits
