"""Text from an engine, piece by piece as it is decoded."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.interface import Engine
from mobillama.engine.sampling import Sampling, sample


class Session:
    """An engine and the ids that it holds; what a new prompt shares with them is not computed again."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids: list[int] = []

    def set(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Make the engine hold exactly ``ids``; return the logits that follow.

        Raises:
            ValueError: ``ids`` is empty or longer than the context.
        """
        self._ids = self._ids[: self.shared(ids)]  # all that surely holds if feeding is interrupted
        self.engine.truncate(len(self._ids))
        logits = self.engine.feed(ids[len(self._ids) :])
        self._ids = list(ids)
        return logits

    def shared(self, ids: Sequence[int]) -> int:
        """Return how many of ``ids`` need not be computed; the last one always is."""
        return min(shared_length(self._ids, ids), len(ids) - 1)

    def append(self, token: int) -> NDArray[np.float32]:
        """Take in one more token; return the logits that follow."""
        logits = self.engine.feed([token])
        self._ids.append(token)
        return logits

    @property
    def is_full(self) -> bool:
        """Whether the context holds no further token."""
        return len(self._ids) >= self.engine.context_length


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of what two sequences begin with."""
    least, most = 0, min(len(one), len(other))
    while least < most:  # slices compare faster than a loop
        middle = (least + most + 1) // 2
        least, most = (middle, most) if one[least:middle] == other[least:middle] else (least, middle - 1)
    return least


def stream_tokens(
    session: Session,
    ids: Sequence[int],
    stop_ids: Container[int],
    sampling: Sampling,
    max_tokens: int,
    random: np.random.Generator,
) -> Iterator[int]:
    """Yield the ids that continue ``ids``, until one of ``stop_ids``, ``max_tokens`` or a full context.

    What stops is neither yielded nor fed.

    Raises:
        ValueError: ``ids`` is empty or does not fit the context.
    """
    logits, seen = session.set(ids), list(ids)
    for remaining in range(max_tokens, 0, -1):
        token = sample(logits, sampling, random, seen)
        if token in stop_ids:
            return
        yield token
        if session.is_full or remaining == 1:
            return
        seen.append(token)
        logits = session.append(token)


def text_of(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of ids as they come, one piece each; a character of several tokens is yielded once it is whole."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield utf8.decode(tokenizer.token_bytes[token])
    yield utf8.decode(b"", final=True)
