"""Text from an engine, piece by piece as it is decoded."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.interface import Engine
from mobillama.engine.lookup import Lookup
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

    def append(self, *tokens: int) -> NDArray[np.float32]:
        """Take in more tokens; return the logits (tokens, vocabulary) that follow each."""
        logits_tv = self.engine.feed(tokens)[None] if len(tokens) == 1 else self.engine.feed_each(tokens)
        self._ids += tokens
        return logits_tv

    def keep(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        del self._ids[length:]
        self.engine.truncate(length)


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
    lookup: int = 0,
) -> Iterator[int]:
    """Yield the ids that continue ``ids``, until one of ``stop_ids``, ``max_tokens`` or a full context.

    What stops is neither yielded nor fed.

    Args:
        session: what decodes; it may hold guesses afterwards.
        ids: what is continued.
        stop_ids: what ends the answer.
        sampling: how tokens are drawn.
        max_tokens: longest answer.
        random: of the draws.
        lookup: feed up to so many guesses with each token (:mod:`mobillama.engine.lookup`). Each token is drawn as without
            them, from the same logits with the same random numbers, and a guess that differs from what is drawn is
            forgotten: the answer is the same, as far as the engine computes the same for one token as for several.

    Raises:
        ValueError: ``ids`` is empty or does not fit the context.
    """
    logits_tv, seen = session.set(ids)[None], list(ids)
    most, memory = min(len(ids) + max_tokens, session.engine.context_length + 1), Lookup(ids, lookup)
    guesses: list[int] = []
    while True:
        start = len(seen)
        for logits_v, guess in zip(logits_tv, [*guesses, None], strict=True):
            token = sample(logits_v, sampling, random, seen)
            if token in stop_ids:
                return
            yield token
            seen.append(token)
            if len(seen) >= most:
                return
            if token != guess:
                break
        memory.learn(len(guesses), len(seen) - start - 1)
        memory.extend(seen[start:])
        if guesses:
            session.keep(len(seen) - 1)
        guesses = memory.guess(most - 1 - len(seen))
        logits_tv = session.append(seen[-1], *guesses)


def text_of(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of ids as they come, one piece each; a character of several tokens is yielded once it is whole."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield utf8.decode(tokenizer.token_bytes[token])
    yield utf8.decode(b"", final=True)
