"""Guessing the next tokens of a text from the place where its last ones stood before (prompt look-up decoding).

A model that summarises, edits or repeats says much that has been said. What followed the same tokens earlier is fed as a guess,
and the engine tells in one pass what it would have said instead: speculative decoding (Leviathan et al. 2023,
arXiv:2211.17192) whose draft is a look-up.
"""

from __future__ import annotations

from collections.abc import Iterable

_LENGTHS = (3, 2)  # of what is looked up; the longest that stood before counts


class Lookup:
    """The tokens so far, and where each few of them last stood.

    Args:
        ids: the text to begin with.
        most: tokens to guess at a time; 0: none.
    """

    def __init__(self, ids: Iterable[int], most: int) -> None:
        self._most, self._width = most, min(most, 4)
        self._ids: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Take in what the text goes on with."""
        if not self._most:
            return
        for token in ids:
            place = len(self._ids)
            for length in _LENGTHS:
                if place >= length:
                    self._followers[tuple(self._ids[place - length :])] = place
            self._ids.append(token)

    def guess(self, room: int) -> list[int]:
        """Return at most ``room`` tokens that may follow; none where the last ones have not stood before."""
        for length in _LENGTHS:
            place = self._followers.get(tuple(self._ids[-length:]))
            if place is not None:
                return self._ids[place : place + min(self._width, room)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Guess more from now on if all of a guess was right, less if not: each wrong one costs a row of every product."""
        if guessed:
            self._width = min(self._most, 2 * guessed if right == guessed else right + 1)
