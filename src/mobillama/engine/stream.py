"""Text from an engine, piece by piece as it is decoded."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

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
        pairs = enumerate(zip(self._ids, ids, strict=False))
        shared = next((place for place, (held, wanted) in pairs if held != wanted), min(len(self._ids), len(ids)))
        keep = min(shared, len(ids) - 1)
        self.engine.truncate(keep)
        logits = self.engine.feed(ids[keep:])
        self._ids = list(ids)
        return logits

    def append(self, token: int) -> NDArray[np.float32]:
        """Take in one more token; return the logits that follow."""
        self._ids.append(token)
        return self.engine.feed([token])

    @property
    def is_full(self) -> bool:
        """Whether the context holds no further token."""
        return len(self._ids) >= self.engine.context_length


def stream_text(
    session: Session,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    random: np.random.Generator,
) -> Iterator[str]:
    """Yield the continuation of ``ids``, one piece of text a token, until the end mark or a limit.

    A character of several tokens is yielded once it is whole. Decoding ends at ``max_tokens`` or when the context is
    full; the end mark itself is neither yielded nor fed.

    Raises:
        ValueError: ``ids`` is empty or does not fit the context.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    logits = session.set(ids)
    for remaining in range(max_tokens, 0, -1):
        token = sample(logits, sampling, random)
        if token == tokenizer.eos_id:
            break
        yield utf8.decode(tokenizer.token_bytes[token])
        if session.is_full or remaining == 1:
            break
        logits = session.append(token)
    yield utf8.decode(b"", final=True)
