"""What every engine answers, whatever computes below. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobillama.errors import UsageError


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine's model takes, each shared weight counted once."""

    weights: int
    """All weights as they are stored."""
    read_per_token: int
    """Weights that a decoded token multiplies with: all but the embedding table, of which one row is looked up."""
    cache: int
    """Keys and values of a full context."""


class Engine(Protocol):
    """One sequence being decoded: its keys and values are kept, so each token is computed once.

    Feeding several tokens is prefill, feeding one is a step of decoding. All buffers are allocated when the model is loaded.
    """

    name: str
    context_length: int
    vocab_size: int
    memory: Memory

    @property
    def length(self) -> int:
        """Number of tokens taken in."""
        ...

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens after those already held; return the logits (vocabulary,) that follow the last.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than ``context_length`` in all.
        """
        ...

    def feed_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens like :meth:`feed`; return the logits (tokens, vocabulary) that follow each."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        ...


class BatchEngine(Protocol):
    """Several sequences decoded together, each in a slot of its own: a step reads the weights once for all of them.

    Keys and values of every slot are allocated when the model is loaded.
    """

    name: str
    slots: int
    context_length: int
    """Tokens that one slot holds."""
    vocab_size: int
    memory: Memory

    def length(self, slot: int) -> int:
        """Return the number of tokens that a slot has taken in."""
        ...

    def feed(self, work: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.float32]:
        """Take in tokens (slot, ids) after those that each slot holds; return the logits (work, vocabulary) that follow the
        last token of each. A prompt and other sequences' next tokens may be fed together.

        Raises:
            ValueError: no work, a slot named twice or not there, or tokens that :meth:`Engine.feed` refuses.
        """
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget all tokens of a slot from position ``length`` on."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a slot hold the first ``length`` tokens of another one, at most all that it holds, and no more."""
        ...


class OneSlot:
    """An engine of one sequence as an engine of one slot."""

    slots = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.context_length, self.vocab_size = engine.name, engine.context_length, engine.vocab_size
        self.memory = engine.memory

    def length(self, slot: int) -> int:
        """Return the number of tokens taken in."""
        return self._engine.length

    def feed(self, work: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.float32]:
        """Take in tokens; return the logits (1, vocabulary) that follow.

        Raises:
            ValueError: see :meth:`BatchEngine.feed`.
        """
        check_work(work, self)
        return self._engine.feed(work[0][1])[None]

    def truncate(self, slot: int, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self._engine.truncate(length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Keep the first ``length`` tokens: there is no other slot."""
        self._engine.truncate(length)


def check_tokens(ids: Sequence[int], engine: Engine) -> None:
    """Refuse what an engine cannot take in.

    Raises:
        ValueError: see :meth:`Engine.feed`.
    """
    _check_ids(ids, engine.length, engine.context_length, engine.vocab_size)


def check_work(work: Sequence[tuple[int, Sequence[int]]], engine: BatchEngine) -> None:
    """Refuse what an engine of several slots cannot take in.

    Raises:
        ValueError: see :meth:`BatchEngine.feed`.
    """
    slots = [slot for slot, _ in work]
    if not work or len(set(slots)) < len(slots) or not all(0 <= slot < engine.slots for slot in slots):
        raise ValueError(f"an engine of {engine.slots} slots is fed some of them, each once, not {slots}")
    for slot, ids in work:
        _check_ids(ids, engine.length(slot), engine.context_length, engine.vocab_size)


def chosen_context(path: Path, wanted: int, most: int) -> int:
    """Return the tokens that a sequence is given room for.

    Args:
        path: of the model.
        wanted: 0: the most.
        most: what the model was made for.

    Raises:
        UsageError: more are wanted.
    """
    if wanted > most:
        raise UsageError(f"--context: {wanted} tokens; {path} was made for at most {most}")
    return wanted or most


def does_not_fit(place: object, context: int, remedy: str = "give --context, a number of tokens that do") -> UsageError:
    """Return the error of a model whose keys and values of a context are more than the memory holds."""
    return UsageError(f"{place}: the model with a context of {context:,} tokens does not fit the memory; {remedy}")


def _check_ids(ids: Sequence[int], held: int, context_length: int, vocab_size: int) -> None:
    if not ids:
        raise ValueError("an engine is fed at least one token")
    if held + len(ids) > context_length:
        raise ValueError(f"a context of {context_length} tokens cannot hold {held + len(ids)}")
    if not (min(ids) >= 0 and max(ids) < vocab_size):
        raise ValueError(f"the model knows the ids 0…{vocab_size - 1}, not {min(ids)}…{max(ids)}")
