"""Which documents hold a text, and in which training steps a model sees them.

The index knows in which windows a text *may* stand; each of them is read again here (and checked against its hashes), and
the text looked for byte by byte. So what is found is exact in case, spaces and punctuation, and may begin within a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mobillama.data.dataset import INDEX_NAME, Dataset
from mobillama.data.order import epoch_permutation
from mobillama.data.tokenizer import Tokenizer
from mobillama.data.trace_index import (
    BORDER,
    WINDOW,
    WINDOWS_AT_ONCE,
    Pieces,
    Stream,
    build_index,
    candidates,
    first_tokens,
)
from mobillama.errors import UsageError

_TOKENS_AT_ONCE = 1 << 14
_CONTEXT = 60
_MIN_CHARACTERS = 3


@dataclass(frozen=True)
class Part:
    """The part of an occurrence within one sequence: tokens ``start``…``end`` of it, and where that is stored.

    ``rows`` are the stored training rows (several where the source's weight is above 1); a held-out sequence has none.
    """

    sequence: int
    start: int
    end: int
    rows: tuple[int, ...]
    held_out: bool


@dataclass(frozen=True)
class Occurrence:
    """A place where the text stands: the document, its first token there, its parts, and the text around it."""

    source: str
    document: int
    file: str
    line: int
    digest: str
    token: int
    parts: tuple[Part, ...]
    before: str
    text: str
    after: str

    @property
    def rows(self) -> list[int]:
        """All stored training rows that hold some of it."""
        return sorted({row for part in self.parts for row in part.rows})


@dataclass(frozen=True)
class Hits:
    """The first occurrences, in the order of the sources, and how many there are (``exact``, or estimated)."""

    occurrences: list[Occurrence]
    total: int
    exact: bool


def trace(dataset: Dataset, text: str, limit: int = 20) -> Hits:
    """Return where a text stands in the documents that a data set was made of, as far as they are stored.

    Args:
        dataset: the data set; its index is built if there is none.
        text: what to look for, exact in case, spaces and punctuation; it may begin and end within a word.
        limit: occurrences to return at most; beyond them the total is estimated.

    Raises:
        UsageError: the text is too short, or holds no letter or digit.
        CorruptDataError: the index is damaged, or the data differ from what was prepared.
    """
    if limit < 1:
        raise UsageError(f"--limit: {limit} is not a positive number")
    needle = _as_decoded(dataset.tokenizer, text)
    if len(text) < _MIN_CHARACTERS or not any(character.isalnum() for character in needle.decode()):
        raise UsageError(
            f"TEXT: {text!r} is too little to look for; give {_MIN_CHARACTERS} characters or more, "
            "letters or digits among them"
        )
    build_index(dataset)
    reader = _Reader(dataset)
    places: set[_Place] = set()  # windows overlap
    share = 1.0
    for number, (window, windows) in enumerate(candidates(dataset.path / INDEX_NAME, needle.decode()), 1):
        places.update(reader.find(window, needle))
        share = number / windows
        if len(places) >= limit and number >= WINDOWS_AT_ONCE:
            break
    occurrences = [reader.occurrence(place, needle) for place in sorted(places)[:limit]]
    return Hits(occurrences, round(len(places) / share), exact=share == 1)


def steps_of_rows(
    dataset: Dataset, rows: Iterable[int], seed: int, batch_size: int, steps: int
) -> dict[int, list[int]]:
    """Return the steps (counted from 1, at most ``steps``) in which a model that learns with a seed sees stored rows."""
    wanted = np.unique(np.fromiter(rows, np.int64))
    size = dataset.size
    seen: dict[int, list[int]] = {row: [] for row in wanted.tolist()}
    for epoch in range(-(-steps * batch_size // size) if len(wanted) else 0):
        if epoch == 0 and seed == dataset.prepared_seed:  # the stored order itself
            within = wanted
        else:
            within = epoch_permutation(dataset.root, seed, size, epoch).inverse(wanted)
        for row, step in zip(wanted.tolist(), ((epoch * size + within) // batch_size + 1).tolist(), strict=True):
            if step <= steps and step not in seen[row][-1:]:  # a step may reach into the next epoch
                seen[row].append(step)
    return seen


@dataclass(frozen=True, order=True)
class _Place:
    """Where an occurrence begins and ends: tokens of its source's stream, and the byte within the first one."""

    source: int
    token: int
    byte: int
    end: int


class _Reader:
    """Looks for a text in windows of the data."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._firsts = first_tokens(dataset)

    def find(self, window: int, needle: bytes) -> Iterator[_Place]:
        """Yield the occurrences of a text that reach into the window with a number."""
        source = int(np.searchsorted(self._firsts, window, side="right")) - 1
        start = window - self._firsts[source]
        stream = self._stream(source)
        _, first, last = self._document(source, start)
        first, last = max(start - len(needle), first), min(start + WINDOW + len(needle), last)
        text = stream.text(first, last)
        at = text.find(needle)
        if at < 0:
            return
        begins = stream.begins(first, last)
        while at >= 0:
            token, final = (np.searchsorted(begins, (at, at + len(needle) - 1), side="right") - 1).tolist()
            yield _Place(source, first + token, at - int(begins[token]), first + final + 1)
            at = text.find(needle, at + 1)

    def occurrence(self, place: _Place, needle: bytes) -> Occurrence:
        """Return all about an occurrence."""
        dataset, stream = self._dataset, self._stream(place.source)
        number, first, last = self._document(place.source, place.token)
        entry = dataset.ledger.entry(place.source, number)
        around = 4 * _CONTEXT  # a character has four bytes at most, a token one at least
        before = stream.text(max(first, place.token - around), place.token)
        here = stream.text(place.token, min(last, place.end + around))
        before, after = before + here[: place.byte], here[place.byte + len(needle) :]
        return Occurrence(
            source=entry.source,
            document=number,
            file=entry.file,
            line=entry.line,
            digest=entry.digest,
            token=place.token - first,
            parts=tuple(self._parts(place)),
            before=before.split(BORDER)[-1].decode(errors="replace")[-_CONTEXT:],
            text=needle.decode(),
            after=after.split(BORDER)[0].decode(errors="replace")[:_CONTEXT],
        )

    def _document(self, source: int, token: int) -> tuple[int, int, int]:
        """Return number, first and last token of the document with a token, without a remainder that was dropped."""
        number = self._dataset.ledger.at(source, token)
        end = int(self._dataset.ledger.table(source)["end"][number])
        return number, self._dataset.ledger.start(source, number), min(end, self._stream(source).tokens)

    def _parts(self, place: _Place) -> Iterator[Part]:
        length = self._dataset.sequence_length
        sequences = np.arange(place.token // length, (place.end - 1) // length + 1)
        rows = self._dataset.layout.train_rows(place.source, sequences)
        for sequence, copies in zip(sequences.tolist(), rows.tolist(), strict=True):
            first = sequence * length
            start, end = max(place.token - first, 0), min(place.end - first, length)
            stored = tuple(sorted(row for row in copies if row >= 0))
            yield Part(sequence, start, end, stored, held_out=not stored)

    @functools.cache  # noqa: B019 a reader lives as long as a search
    def _stream(self, source: int) -> Stream:
        return Stream(self._dataset, source, _TOKENS_AT_ONCE)


def _as_decoded(tokenizer: Tokenizer, text: str) -> bytes:
    """Return the bytes of a text as they come out of a tokenizer, which may put some characters for others.

    Raises:
        UsageError: the tokenizer has no ids for it.
    """
    # Behind a letter, where no tokenizer puts a space before it.
    (ids,) = tokenizer.encode(["x" + text.encode(errors="replace").decode()])
    _, _, decoded = Pieces(tokenizer).join(np.array(ids))[0].partition(b"x")
    if BORDER in decoded:
        raise UsageError(f"TEXT: {text!r} holds characters that the data's tokenizer has no ids for; leave them out")
    return decoded
