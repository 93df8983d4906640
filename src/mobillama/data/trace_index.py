"""The index behind a trace: in which windows of the stored documents a text may stand.

It is built (with tantivy) from the stored sequences alone: the ids of every document, decoded, in windows that overlap.
"""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.dataset import INDEX_NAME, Dataset
from mobillama.data.tokenizer import Tokenizer
from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import new_directory, read_json, write_json

if TYPE_CHECKING:
    from tantivy import Query, Schema

    from mobillama.data.prepare.stages import Progress

FACTS_NAME = "facts.json"

_FORMAT = "mobillama-trace-index-1"

# A document is indexed in windows of so many tokens. Every token is a byte at least, so that a text of at most
# _OVERLAP bytes stands whole in some window.
WINDOW = 2048
_OVERLAP = 256

# What the index holds of a text: its words, and characters of scripts without spaces one by one. Whether a word ends
# between two characters depends on these two alone, so the words of a text are the same wherever it stands, but for its
# first and last one, which may go on beside it.
_WORDS = re.compile("[A-Za-z0-9]+|[\u00c0-\u0dff]+|[^\\x00-\\x7f\\s]")
_WORD_BYTES = bytes(byte if chr(byte).isalnum() or 0x80 <= byte < 0xFF else ord(" ") for byte in range(256))

# Stands for what the ids do not tell: end marks, unknown characters, sequences that are stored nowhere. No text holds it.
BORDER = b"\xff"
_NOWHERE = -1

_HEAP_BYTES = 128_000_000
_TOKENS_AT_ONCE = 1 << 19
WINDOWS_AT_ONCE = 256
_DOCUMENTS_AT_ONCE = 1 << 16


def build_index(dataset: Dataset, progress: Progress | None = None) -> None:
    """Build the index of a data set in its directory; one of these very data that is already there is kept.

    Raises:
        UsageError: the data directory cannot be written.
        CorruptDataError: the data differ from what was prepared.
    """
    path = dataset.path / INDEX_NAME
    if _is_current(dataset):
        return
    try:
        if path.exists():  # of other data, or damaged
            shutil.rmtree(path)
        with new_directory(path) as work:
            windows = _fill(dataset, work, progress or (lambda stage, done, total: None))
            files = {file.name: file.stat().st_size for file in work.iterdir() if not file.name.startswith(".")}
            facts = {"format": _FORMAT, "data": dataset.digest, "root": dataset.root.hex(), "windows": windows}
            write_json(work / FACTS_NAME, {**facts, "files": files})
            mode = (work / FACTS_NAME).stat().st_mode
            for file in work.iterdir():  # tantivy keeps some to their owner
                file.chmod(mode)
    except OSError as error:
        raise UsageError(
            f"{error.filename or path}: the index cannot be written ({error.strerror}); "
            "free space, or use a copy of the data that you may write to"
        ) from None


class Stream:
    """The text of a source in the order of its documents, read from where its sequences are stored.

    Args:
        dataset: the data set.
        source: index of the source.
        tokens: how many are read at once, about.
    """

    def __init__(self, dataset: Dataset, source: int, tokens: int) -> None:
        self._dataset, self._source = dataset, source
        self._length = dataset.sequence_length
        self._block = max(1, tokens // self._length)
        self._blocks = functools.lru_cache(maxsize=2)(self._read)
        self._pieces = Pieces(dataset.tokenizer)
        self._holdout = dataset.holdout_file(dataset.source_names[source])
        self._sequences = dataset.layout.sources[source].sequences
        self.tokens = self._sequences * self._length

    def text(self, start: int, end: int) -> bytes:
        """Return the bytes of the tokens start…end."""
        return b"".join([text[ends[low] : ends[high]] for (text, ends), low, high in self._touched(start, end)])

    def begins(self, start: int, end: int) -> NDArray[np.int64]:
        """Return where each of the tokens start…end begins within their bytes, and the last one ends."""
        lengths = [np.diff(ends[low : high + 1]) for (_, ends), low, high in self._touched(start, end)]
        return np.cumsum(np.concatenate([[0], *lengths]))

    def _touched(self, start: int, end: int) -> Iterator[tuple[tuple[bytes, NDArray[np.int64]], int, int]]:
        size = self._block * self._length
        for block in range(start // size, -(-end // size)):
            first = block * size
            yield self._blocks(block), max(start - first, 0), min(end - first, size)

    def _read(self, block: int) -> tuple[bytes, NDArray[np.int64]]:
        layout, start = self._dataset.layout, block * self._block
        end = min(start + self._block, self._sequences)
        ids = np.full((end - start, self._length), _NOWHERE, np.int64)
        index, row = layout.destinations(self._source, start, end)
        trained = row < layout.train_size
        once, copy = np.unique(index[trained], return_index=True)
        ids[once] = self._dataset.read(row[trained][copy])
        if not trained.all():
            ids[index[~trained]] = self._holdout.read(row[~trained] - layout.holdout_starts[self._source])
        return self._pieces.join(ids.reshape(-1))


class Pieces:
    """What the ids of a tokenizer stand for: at least a byte each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = [piece or BORDER for piece in tokenizer.token_bytes] + [BORDER]  # the last one: _NOWHERE
        self._lengths = np.array([len(piece) for piece in pieces])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def join(self, ids: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """Return the bytes of ids, and where each begins and the last one ends (ids + 1,)."""
        lengths = self._lengths[ids]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        offsets = np.repeat(self._starts[ids] - ends[:-1], lengths)
        return self._bytes[offsets + np.arange(ends[-1])].tobytes(), ends


def first_tokens(dataset: Dataset) -> NDArray[np.int64]:
    """Return where each source begins when the sources' streams are put one behind the other."""
    return np.cumsum([0] + [source.sequences * dataset.sequence_length for source in dataset.layout.sources])


def _is_current(dataset: Dataset) -> bool:
    """Tell whether there is a whole index of these very data."""
    path = dataset.path / INDEX_NAME
    try:
        facts = read_json(path / FACTS_NAME)
        sizes = {name: (path / name).stat().st_size for name in facts["files"]}
    except (CorruptDataError, KeyError, OSError):
        return False
    return (facts.get("format"), facts.get("data"), facts["files"]) == (_FORMAT, dataset.digest, sizes)


def _fill(dataset: Dataset, path: Path, progress: Progress) -> int:
    """Write the index of all windows; return their number."""
    from tantivy import Document, Index, SchemaBuilder

    schema = SchemaBuilder().add_text_field("words", tokenizer_name="whitespace")
    writer = Index(schema.add_unsigned_field("window", fast=True).build(), str(path)).writer(_HEAP_BYTES)
    total = int(first_tokens(dataset)[-1]) // dataset.sequence_length
    windows = 0
    try:
        for number, text in _windows(dataset):
            document = Document()
            document.add_text("words", _words(text))
            document.add_unsigned("window", number)
            writer.add_document(document)
            if windows % WINDOWS_AT_ONCE == 0:
                progress("index", number // dataset.sequence_length, total)
            windows += 1
        writer.commit()
        writer.wait_merging_threads()
    except ValueError as error:  # how tantivy reports a full disk
        where = dataset.path / INDEX_NAME
        raise UsageError(f"{where}: the index cannot be written ({error}); free space, then run this again") from None
    progress("index", total, total)
    return windows


def _windows(dataset: Dataset) -> Iterator[tuple[int, bytes]]:
    """Yield number and text of every window that holds text; its number is its first token, over all sources."""
    for source, base in enumerate(first_tokens(dataset)[:-1].tolist()):
        stream = Stream(dataset, source, _TOKENS_AT_ONCE)
        for first, last in _documents(dataset.ledger.table(source), stream.tokens):
            for start in range(first, max(last - _OVERLAP, first + 1), WINDOW - _OVERLAP):
                text = stream.text(start, min(start + WINDOW, last))
                if text.strip(BORDER):
                    yield base + start, text


def _documents(table: NDArray[np.void], tokens: int) -> Iterator[tuple[int, int]]:
    """Yield first and last token of the documents that have some among the first ``tokens`` of their source."""
    before = 0
    for row in range(0, len(table), _DOCUMENTS_AT_ONCE):
        ends = np.minimum(table["end"][row : row + _DOCUMENTS_AT_ONCE].astype(np.int64), tokens)
        starts = np.concatenate([[before], ends[:-1]])
        before = int(ends[-1])
        yield from zip(starts[ends > starts].tolist(), ends[ends > starts].tolist(), strict=True)


def _words(text: bytes) -> str:
    """Return the words of a text with spaces between them."""
    words = text.translate(_WORD_BYTES).decode(errors="replace")
    return words if words.isascii() else " ".join(_WORDS.findall(words))


def _stands_alone(word: str) -> bool:
    """Tell whether a word is a character of a script without spaces."""
    return not word.isascii() and not "\u00c0" <= word[0] <= "\u0dff"


def candidates(path: Path, needle: str) -> Iterator[tuple[int, int]]:
    """Yield the windows that may hold a text, in order, each with the number of them all.

    Raises:
        CorruptDataError: the index is damaged.
    """
    from tantivy import Index, Order

    done = 0
    try:
        # tantivy locks a directory to read it, not that of the data, and may do so once more
        # while it is removed: a directory with an empty file is left then
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as links:
            for file in path.iterdir():
                if file.suffix != ".lock":
                    (Path(links) / file.name).symlink_to(file.absolute())
            index = Index.open(links)
            index.config_reader("manual")  # ends the thread that watches the directory, but not at once
            searcher, query = index.searcher(), _query(index.schema, needle)
            while True:
                limit = max(WINDOWS_AT_ONCE, done)
                result: Any = searcher.search(query, limit, True, "window", done, Order.Asc)
                yield from ((window, result.count) for window, _ in result.hits)
                done += len(result.hits)
                if len(result.hits) < limit:
                    return
    except ValueError as error:
        raise CorruptDataError(f"{path}: damaged ({error}); remove it, and it is built again") from None


def _query(schema: Schema, needle: str) -> Query:
    """Return what holds for every window with a text: its whole words in a row, and its first and last one in part."""
    from tantivy import Occur, Query

    start = max(next(_WORDS.finditer(needle)).start() - 1, 0)  # what stands before a word makes it a whole one
    probe = needle[start:].encode()[:_OVERLAP].decode(errors="ignore")
    whole: list[tuple[int, str]] = []
    parts: list[Query] = []
    for position, word in enumerate(_WORDS.finditer(probe)):
        begins, ends = word.start() > 0, word.end() < len(probe)
        if (begins and ends) or _stands_alone(word[0]):
            whole.append((position, word[0]))
        else:
            pattern = f"{'' if begins else '.*'}{word[0]}{'' if ends else '.*'}"
            parts.append(Query.regex_query(schema, "words", pattern))
    required = parts if len(whole) < 3 else []  # three words in a row are rare enough
    if len(whole) > 1:
        required.append(Query.phrase_query(schema, "words", list(whole)))
    elif whole:
        required.append(Query.term_query(schema, "words", whole[0][1]))
    return Query.boolean_query([(Occur.Must, query) for query in required])
