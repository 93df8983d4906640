"""Token sequences laid out as prefix trees: what they share is one piece of a row and goes through the model once.

Sequences sorted by their tokens are a tree in depth-first order: each shares its longest prefix with the one before it. A
row is such a run of sequences, written as the tokens that each adds. Then a token sees another exactly if that one's
subtree has not ended yet, so that one number per token, its *end*, says the whole attention mask::

    visible[query, key] = key <= query < end[key]

and its position is its depth. All choices of a question stand behind their context like this, questions behind examples
that they have in common, and what shares nothing stands side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Sequence:
    """Tokens of which the last ``scored`` are to be predicted from all before them."""

    ids: Ints
    scored: int

    @property
    def inputs(self) -> Ints:
        """What the model reads: all tokens but the last."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Row:
    """A forest of sequences in one row of t tokens, with its n predictions."""

    ids_t: Ints
    positions_t: Ints
    """Depth of each token in its tree."""
    ends_t: Ints
    """Where the subtree of each token ends."""
    at_n: Ints
    """The token whose output makes each prediction."""
    targets_n: Ints
    """The token to be predicted."""
    sequences_n: Ints
    """The sequence that the prediction belongs to; those of a sequence stand together, in its order."""

    def __len__(self) -> int:
        return len(self.ids_t)


def pack(sequences: list[Sequence], row_tokens: int, branching: bool = True) -> list[Row]:
    """Lay sequences out in rows, longest rows first; every sequence stands whole in one row.

    Args:
        sequences: in any order; each has at least two tokens.
        row_tokens: how far a row is filled with sequences that have little in common. One that shares most of its tokens
            with the row may fill it to twice this, or to twice the longest sequence: attention over a longer row costs
            less than the shared tokens once more.
        branching: False for models that take no mask of ours: then a row is one sequence and prefixes of it, which the
            causal mask serves.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].inputs.astype(">i4").tobytes())
    rows: list[Row] = []
    members: list[int] = []
    shared: list[int] = []
    length = 0
    before = np.empty(0, np.int32)
    for index in order:
        inputs = sequences[index].inputs
        common = _common_prefix(before, inputs)
        new = len(inputs) - common
        limit = 2 * max(row_tokens, len(inputs)) if common >= new else row_tokens
        if members and (length + new > limit or (not branching and common < len(before))):
            rows.append(_lay_out(sequences, members, shared))
            members, shared, length = [], [], 0
        if not members:
            common, new = 0, len(inputs)
        members.append(index)
        shared.append(common)
        length += new
        before = inputs
    if members:
        rows.append(_lay_out(sequences, members, shared))
    return sorted(rows, key=len, reverse=True)


def _common_prefix(a: Ints, b: Ints) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _lay_out(sequences: list[Sequence], members: list[int], shared: list[int]) -> Row:
    """Write sorted sequences as one row, each without the ``shared`` tokens that it has in common with the one before."""
    paths = [sequences[index].inputs for index in members]
    total = sum(len(path) - common for path, common in zip(paths, shared, strict=True))
    ends = np.full(total, total, np.int32)
    place_of_depth = np.empty(max(map(len, paths)), np.int32)  # along the current path
    at, depth, start = [], 0, 0
    for index, path, common in zip(members, paths, shared, strict=True):
        ends[place_of_depth[common:depth]] = start
        depth = len(path)
        place_of_depth[common:depth] = np.arange(start, start + depth - common)
        start += depth - common
        at.append(place_of_depth[depth - sequences[index].scored : depth].copy())
    return Row(
        ids_t=np.concatenate([path[common:] for path, common in zip(paths, shared, strict=True)]),
        positions_t=np.concatenate(
            [np.arange(common, len(path), dtype=np.int32) for path, common in zip(paths, shared, strict=True)]
        ),
        ends_t=ends,
        at_n=np.concatenate(at),
        targets_n=np.concatenate([sequences[index].ids[-sequences[index].scored :] for index in members]),
        sequences_n=np.repeat(np.array(members, np.int32), [sequences[index].scored for index in members]),
    )


@dataclass(frozen=True)
class Batch:
    """b rows of t tokens, padded on the right, with the n predictions of all of them."""

    ids_bt: Ints
    positions_bt: Ints
    ends_bt: Ints
    outputs_m: Ints
    """The m different tokens, counted through all rows, whose outputs are needed."""
    output_n: Ints
    """Which of them makes each prediction."""
    targets_n: Ints
    sequences_n: Ints

    @property
    def tokens(self) -> int:
        """What the model is made to compute, padding included."""
        return self.ids_bt.size


def batches(rows: list[Row], batch_tokens: int, multiple: int = 32) -> Iterator[Batch]:
    """Yield rows together, as many as fit ``batch_tokens`` (at least one), padded to a multiple of ``multiple`` tokens."""
    first = 0
    while first < len(rows):
        width = -(-len(rows[first]) // multiple) * multiple
        count = max(1, batch_tokens // width)
        yield _collate(rows[first : first + count], width)
        first += count


def _collate(rows: list[Row], width: int) -> Batch:
    ids, positions, ends = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    ends[:] = np.arange(1, width + 1)  # a padded token is seen by itself alone
    for number, row in enumerate(rows):
        ids[number, : len(row)], positions[number, : len(row)] = row.ids_t, row.positions_t
        ends[number, : len(row)] = row.ends_t
    at = np.concatenate([row.at_n + number * width for number, row in enumerate(rows)])
    outputs, output = np.unique(at, return_inverse=True)
    targets, sequences = (np.concatenate([getattr(row, name) for row in rows]) for name in ("targets_n", "sequences_n"))
    return Batch(ids, positions, ends, outputs.astype(np.int32), output.astype(np.int32), targets, sequences)
