"""Packed conversations: gathered from their sources, written into the run directory, and read as the loop reads data.

A sequence stands in its file as ids and marks (2 · length), so that one leaf of the Merkle tree proves both. All else is as
in pre-training: the order is arithmetic over the root, every sequence is checked when it is read.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.dataset import Batch
from mobillama.data.order import order
from mobillama.data.store import SequenceFile, write_array, write_sequences
from mobillama.data.template import ChatTemplate
from mobillama.data.tokenizer import Tokenizer, id_type, load_tokenizer, save_tokenizer, token_lengths
from mobillama.errors import UsageError
from mobillama.progress import Show
from mobillama.record.files import new_directory
from mobillama.record.manifest import read_manifest, verify_manifest, write_manifest
from mobillama.tune.conversations import Conversation, RowFault, read_conversations
from mobillama.tune.pack import Piece, encode, pack, rows_of
from mobillama.tune.recipe import SftRecipe

FORMAT = "mobillama-conversations-1"
DATA_DIRECTORY = "data"
"""Of a run directory, where its conversations stand."""
TRAIN_FILE, LEARNED_FILE = "train/sequences.npy", "train/learned.npy"
COUNTS = ("rows", "faulty", "nothing_to_learn", "lost_answers", "split", "too_long", "held_out")
"""What is counted of each source: its rows; those skipped as no conversation, or since they hold no answer to learn;
conversations that began with an answer, which was left out; those that were split; exchanges too long for a sequence, left
out; and conversations held out."""
_ROWS_AT_ONCE = 1024


def quiet(stage: str, done: float, total: float) -> None:
    """Show nothing."""


@dataclass
class Gathered:
    """The conversations of one source in memory."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    train: list[Piece] = field(default_factory=list)
    held_out: list[Piece] = field(default_factory=list)


def gather(recipe: SftRecipe, template: ChatTemplate, length: int, show: Show = quiet) -> list[Gathered]:
    """Read the conversations of all sources, in pieces of at most ``length`` ids.

    Raises:
        UsageError: a row is no conversation (unless they are skipped), or there is nothing to learn; place and fault are
            named.
        CorruptDataError: a source cannot be read to its end.
    """
    sources = []
    for name, source in recipe.sources.items():
        gathered = Gathered(name)
        for place, row in read_conversations(source):
            gathered.counts["rows"] += 1
            try:
                _add(gathered, row, recipe.holdout, template, length)
            except (RowFault, UsageError) as fault:
                if recipe.bad_rows == "stop":
                    raise UsageError(f"{place}: {fault}; mend or remove it, or set bad_rows: skip") from None
                gathered.counts["faulty"] += 1
            if gathered.counts["rows"] % 256 == 0:
                show(f"read {name}", gathered.counts["rows"], gathered.counts["rows"])
        sources.append(gathered)
    if not any(gathered.train for gathered in sources):
        counts = ", ".join(f"{key} {sum(source.counts[key] for source in sources)}" for key in COUNTS)
        raise UsageError(
            f"sources: hold nothing to learn ({counts}); give conversations with answers, or a longer context"
        )
    return sources


def _add(gathered: Gathered, row: Any, holdout: float, template: ChatTemplate, length: int) -> None:
    if isinstance(row, RowFault):
        raise row
    pieces = encode(row, template, length, gathered.counts) if row else []
    gathered.counts["nothing_to_learn"] += not pieces
    if pieces:
        gathered.counts["lost_answers"] += row.has_lost_answer
        held_out = is_held_out(row, holdout)
        gathered.counts["held_out"] += held_out
        (gathered.held_out if held_out else gathered.train).extend(pieces)


def is_held_out(conversation: Conversation, share: float) -> bool:
    """Tell whether a conversation is held out, which what is said in it decides: others, or their order, change nothing."""
    return int.from_bytes(conversation.digest, "big") < share * (1 << 64)


def write(
    path: Path, sources: list[Gathered], inputs: dict[str, Any], length: int, tokenizer: Tokenizer, show: Show = quiet
) -> None:
    """Pack the conversations into sequences and write them, whole or not at all.

    Args:
        path: the directory to make.
        sources: what was gathered.
        inputs: everything that decides the outcome, for the manifest.
        length: ids of a sequence.
        tokenizer: made the ids; its chat template goes with it.
        show: told the progress.
    """
    dtype = id_type(max(tokenizer.vocab_size, 2 * length + 2))
    facts, holdout, train, learned = [], [], [], []
    with new_directory(path) as work:
        (work / "train").mkdir()
        (work / "holdout").mkdir()
        for done, source in enumerate(sources, 1):
            packed = pack([len(piece.ids) for piece in source.train], length)
            train.append(rows_of(source.train, packed, length, tokenizer.eos_id))
            of_piece = [int(piece.is_learned.sum()) for piece in source.train]
            learned += [sum(of_piece[number] for number in members) for members in packed]
            held = pack([len(piece.ids) for piece in source.held_out], length)
            rows = rows_of(source.held_out, held, length, tokenizer.eos_id)
            file = f"holdout/{source.name}.npy"
            root, _ = write_sequences(work / file, (len(held), 2 * length), dtype, _blocks(rows))
            holdout.append({"source": source.name, "file": file, "rows": len(held), "root": root.hex()})
            facts.append(
                {
                    "name": source.name,
                    **{key: source.counts[key] for key in COUNTS},
                    "sequences": len(packed),
                    "tokens": sum(len(piece.ids) for piece in source.train),
                    "learned_tokens": sum(of_piece),
                }
            )
            show("pack", done, len(sources))
        root, _ = write_sequences(
            work / TRAIN_FILE, (len(learned), 2 * length), dtype, _blocks(itertools.chain(*train))
        )
        counts = np.array(learned, np.dtype("<u4"))
        write_array(work / LEARNED_FILE, counts.shape, counts.dtype, [counts.tobytes()])
        save_tokenizer(tokenizer, work / "tokenizer")
        manifest = {
            "format": FORMAT,
            "inputs": inputs,
            "root": root.hex(),
            "dtype": dtype.str,
            "train_sequences": len(learned),
            "sources": facts,
            "holdout": holdout,
        }
        write_manifest(work, manifest)


def _blocks(rows: Iterable[NDArray[np.int64]]) -> Iterable[NDArray[np.int64]]:
    waiting = iter(rows)
    while block := list(itertools.islice(waiting, _ROWS_AT_ONCE)):
        yield np.stack(block)


class ChatData:
    """A directory that :func:`write` made.

    Raises:
        UsageError: there is none.
        CorruptDataError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path, FORMAT)
        verify_manifest(path, self.manifest, hashed=False)
        verify_manifest(path, self.manifest, LEARNED_FILE)
        self.digest: str = self.manifest["digest"]
        self.root = bytes.fromhex(self.manifest["root"])
        self.sequence_length: int = self.manifest["inputs"]["length"]
        self.size: int = self.manifest["train_sequences"]
        self.source_names: list[str] = [source["name"] for source in self.manifest["sources"]]
        self._starts = np.cumsum([0] + [source["sequences"] for source in self.manifest["sources"]])[:-1]
        self._train = self._file(TRAIN_FILE, self.size, self.manifest["root"])
        self._holdout = {
            held["source"]: self._file(held["file"], held["rows"], held["root"]) for held in self.manifest["holdout"]
        }
        self._learned: NDArray[np.uint32] = np.load(path / LEARNED_FILE, allow_pickle=False)

    @property
    def chunk_ends(self) -> list[int]:
        """The number of training sequences: they are one chunk."""
        return [self.size]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, with the chat template."""
        verify_manifest(self.path, self.manifest, "tokenizer/")
        return load_tokenizer(self.path / "tokenizer")

    @functools.cached_property
    def token_lengths(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for; special tokens stand for none."""
        return token_lengths(self.tokenizer)

    @property
    def holdout_sizes(self) -> dict[str, int]:
        """The number of held-out sequences of each source."""
        return {name: file.rows for name, file in self._holdout.items()}

    def rows_of_step(self, seed: int, step: int, batch_size: int) -> NDArray[np.int64]:
        """Return the stored rows of step ``step`` (from 0), in order; epochs follow one another without a gap."""
        return order(self.root, seed, self.size, np.arange(step * batch_size, (step + 1) * batch_size))

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        """Return the sequences of a step, or a ``part`` of them.

        Raises:
            CorruptDataError: a sequence differs from what was prepared.
        """
        rows = self.rows_of_step(seed, step, batch_size)[part]
        return self._batch(self._train, rows, np.searchsorted(self._starts, rows, side="right") - 1)

    def learned_tokens(self, seed: int, step: int, batch_size: int) -> int:
        """Return how many tokens a step learns from, over all processes."""
        return int(self._learned[self.rows_of_step(seed, step, batch_size)].sum())

    def holdout_batch(self, source: str, limit: int, start: int) -> Batch:
        """Return at most ``limit`` held-out sequences of a source from ``start`` on."""
        file = self._holdout[source]
        rows = np.arange(start, min(start + limit, file.rows))
        return self._batch(file, rows, np.full(len(rows), self.source_names.index(source)))

    def _batch(self, file: SequenceFile, rows: NDArray[np.int64], sources: NDArray[np.int64]) -> Batch:
        stored = file.read(rows).astype(np.int64)
        return Batch(stored[:, : self.sequence_length], rows, sources, stored[:, self.sequence_length :])

    def _file(self, name: str, rows: int, root: str) -> SequenceFile:
        dtype = np.dtype(self.manifest["dtype"])
        return SequenceFile(self.path / name, (rows, 2 * self.sequence_length), dtype, bytes.fromhex(root))
