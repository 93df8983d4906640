"""Conversations to sequences: ids with marks, long ones split at the borders of turns, short ones packed together.

A mark is twice the number of the conversation within its sequence, and one more where the id is to be learned
(:class:`mobillama.data.dataset.Batch`): what the assistant says, with the mark that ends its turn, and nothing else.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobillama.data.template import ChatTemplate, Encoded
from mobillama.tune.conversations import Conversation


@dataclass(frozen=True)
class Piece:
    """A conversation, or as many of its turns as fit a sequence: ids (n,) and which of them are learned (n,)."""

    ids: NDArray[np.uint32]
    is_learned: NDArray[np.bool_]


def encode(conversation: Conversation, template: ChatTemplate, length: int, counts: Counter[str]) -> list[Piece]:
    """Return a conversation in pieces of at most ``length`` ids, each a conversation of its own.

    What does not fit one piece is divided before a user's message; every piece begins with the system's message. A
    question that does not fit with its answer is left out.

    Args:
        conversation: what is said.
        template: how it is written.
        length: ids of a sequence.
        counts: told of ``split`` conversations and of exchanges that were ``too_long``.

    Raises:
        UsageError: the template refuses it.
    """
    messages, is_learned = conversation.messages, conversation.is_learned
    whole = template.encode(messages)
    if len(whole.ids) <= length:
        return _learnable(whole, is_learned)
    counts["split"] += 1
    first = messages[0]["role"] == "system"
    # Exchanges: a question with its answer. What the parts of a conversation take tells how many fit.
    borders = [n for n, message in enumerate(messages) if message["role"] == "user"] + [len(messages)]
    ends = [0, *(whole.spans[end - 1][1] for end in borders[1:])]
    head = whole.spans[0][1] if first else 0
    pieces, start = [], 0
    while start < len(borders) - 1:
        fits = [n for n in range(start + 1, len(borders)) if head + ends[n] - ends[start] <= length]
        end = fits[-1] if fits else start + 1
        while end > start:
            part = slice(borders[start], borders[end])
            encoded = template.encode([*messages[:first], *messages[part]])
            if len(encoded.ids) <= length:
                pieces += _learnable(encoded, [*is_learned[:first], *is_learned[part]])
                break
            end -= 1
        counts["too_long"] += end == start
        start = max(end, start + 1)
    return pieces


def _learnable(encoded: Encoded, is_learned: Sequence[bool]) -> list[Piece]:
    """Return an encoded conversation as a piece, or none where it leaves nothing to learn."""
    mask = np.zeros(len(encoded.ids), np.bool_)
    for (start, end), learned in zip(encoded.spans, is_learned, strict=True):
        mask[start:end] = learned
    mask[0] = False  # nothing stands before it that it could be predicted from
    return [Piece(np.array(encoded.ids, np.uint32), mask)] if mask.any() else []


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return which pieces make each sequence: best fit, the longest first, the same for the same lengths.

    Args:
        lengths: of the pieces, none above ``length``.
        length: of a sequence.
    """
    sequences: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(length + 1)]
    spaces = 0  # bit n: there is a sequence with space for n ids
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        fitting = spaces >> lengths[piece]
        if fitting:
            space = lengths[piece] + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = length, len(sequences)
            sequences.append([])
        sequences[chosen].append(piece)
        space -= lengths[piece]
        with_space[space].append(chosen)
        spaces |= 1 << space
    return sequences


def rows_of(
    pieces: Sequence[Piece], sequences: Sequence[Sequence[int]], length: int, eos_id: int
) -> Iterator[NDArray[np.int64]]:
    """Yield each sequence as a row (2 · length,): its ids, then their marks. End marks that nobody learns fill it up."""
    for members in sequences:
        row = np.zeros((2, length), np.int64)
        ends = list(itertools.accumulate((len(pieces[n].ids) for n in members), initial=0))
        for document, (number, start, end) in enumerate(zip(members, ends[:-1], ends[1:], strict=True)):
            row[0, start:end] = pieces[number].ids
            row[1, start:end] = 2 * document + pieces[number].is_learned
        row[0, ends[-1] :] = eos_id
        row[1, ends[-1] :] = 2 * len(members)
        yield row.reshape(-1)
