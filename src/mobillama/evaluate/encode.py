"""Requests as tokens, divided between context and continuation as the harness divides them, each context encoded once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from mobillama.errors import UsageError
from mobillama.evaluate.tree import Sequence
from mobillama.record.files import sha256_json

_BLOCK = 1024  # texts handed to the tokenizer at once


@dataclass(frozen=True)
class TextTokenizer:
    """A transformers tokenizer and what it puts around a text.

    Args:
        tokenizer: from ``AutoTokenizer``.
        files: sha256 of what it was loaded from.
        special_tokens: see :class:`mobillama.evaluate.suites.Suite`.
    """

    tokenizer: Any
    files: str
    special_tokens: bool

    @property
    def digest(self) -> str:
        """Names what the ids depend on."""
        return sha256_json({"files": self.files, "special_tokens": self.special_tokens, "prefix": self.prefix})

    @property
    def prefix(self) -> int:
        """The token that stands before a text without context.

        Raises:
            UsageError: the tokenizer has no end mark.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prefix = bos if self.special_tokens and bos is not None else eos
        if prefix is None:
            raise UsageError(
                f"{self.tokenizer.name_or_path}: its tokenizer names no eos_token; add it to tokenizer_config.json"
            )
        return int(prefix)

    @property
    def file(self) -> Path:
        """The file of its vocabulary, or the directory where that goes by another name."""
        directory = Path(self.tokenizer.name_or_path)
        files = (directory / name for name in ("tokenizer.json", "tokenizer.model"))
        return next((file for file in files if file.is_file()), directory)

    def ids(self, texts: list[str], special_tokens: bool | None = None) -> list[NDArray[np.int32]]:
        """Return the ids of texts."""
        added = self.special_tokens if special_tokens is None else special_tokens
        found: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), _BLOCK):
            part = self.tokenizer(
                texts[start : start + _BLOCK], add_special_tokens=added, return_attention_mask=False, verbose=False
            )
            found += [np.array(ids, np.int32) for ids in part["input_ids"]]
        return found


@dataclass(frozen=True)
class Encoded:
    """Tokens of n requests: their different contexts, and a continuation each, as flat ids with the ends of each piece."""

    context_ids: NDArray[np.int32]
    context_ends: NDArray[np.int64]
    context_of_n: NDArray[np.int32]
    continuation_ids: NDArray[np.int32]
    continuation_ends_n: NDArray[np.int64]
    rolling: NDArray[np.bool_]
    """Whether continuations are whole texts, to be scored in windows (a scalar)."""


def encode(tokenizer: TextTokenizer, contexts: list[str], continuations: list[str], rolling: bool) -> Encoded:
    """Return the tokens of requests.

    As ``TemplateLM._encode_pair`` of the harness does: spaces at a context's end belong to the continuation, whose tokens are
    those of both texts together behind as many as the context has alone; without context, the prefix token stands there.
    """
    prefix = np.array([tokenizer.prefix], np.int32)
    if rolling:
        texts = tokenizer.ids(continuations)
        if empty := [text for text, ids in zip(continuations, texts, strict=True) if text and not len(ids)]:
            raise _no_tokens(tokenizer, empty[0])
        return _encoded([prefix], [0] * len(continuations), texts, rolling)
    places: dict[str, int] = {}
    context_of = [places.setdefault(context.rstrip(), len(places)) for context in contexts]
    heads = tokenizer.ids(list(places))
    if "" in places:
        heads[places[""]] = prefix
    parts: list[NDArray[np.int32]] = []
    for start in range(0, len(contexts), _BLOCK):
        part_of = slice(start, start + _BLOCK)
        block = list(zip(contexts[part_of], continuations[part_of], context_of[part_of], strict=True))
        whole = tokenizer.ids([context + continuation for context, continuation, _ in block if context])
        bare = tokenizer.ids([continuation for context, continuation, _ in block if not context], special_tokens=False)
        behind, alone = iter(whole), iter(bare)
        for context, continuation, head in block:
            part = next(behind)[len(heads[head]) :] if context else _without(prefix, next(alone))
            if not len(part):
                raise _no_tokens(tokenizer, continuation)
            parts.append(part)
    return _encoded(heads, context_of, parts, rolling)


def _no_tokens(tokenizer: TextTokenizer, text: str) -> UsageError:
    return UsageError(
        f"{tokenizer.file}: turns {textwrap.shorten(text, 40)!r} into no token of its own; copy the model's own tokenizer there"
    )


def _without(prefix: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return a text's ids without a prefix token that it brings along."""
    return ids[1:] if ids[:1] == prefix else ids


def _encoded(
    heads: list[NDArray[np.int32]], context_of: list[int], parts: list[NDArray[np.int32]], rolling: bool
) -> Encoded:
    return Encoded(
        np.concatenate(heads),
        np.cumsum([len(head) for head in heads]),
        np.array(context_of, np.int32),
        np.concatenate(parts),
        np.cumsum([len(part) for part in parts]),
        np.array(rolling),
    )


@dataclass(frozen=True)
class Truncated:
    """What did not fit the model's context."""

    contexts: int
    """Requests whose context lost tokens at its beginning, as in the harness."""
    continuations: int
    """Requests of which not even the continuation fits: its last tokens are scored, where the harness would stop."""


def to_sequences(encoded: Encoded, context_length: int) -> tuple[list[Sequence], list[int], Truncated]:
    """Return what a model is to score, the request that each belongs to, and what did not fit.

    Args:
        encoded: tokens of n requests.
        context_length: tokens that the model reads at once.
    """
    heads = np.split(encoded.context_ids, encoded.context_ends[:-1])
    parts = np.split(encoded.continuation_ids, encoded.continuation_ends_n[:-1])
    sequences, request_of = [], []
    contexts = continuations = 0
    for index, (head, part) in enumerate(zip(encoded.context_of_n, parts, strict=True)):
        for context, continuation in _windows(heads[head], part, context_length, bool(encoded.rolling)):
            whole = np.concatenate([context, continuation])
            contexts += len(whole) > context_length + 1
            continuations += len(continuation) > context_length
            scored = min(len(continuation), context_length)
            sequences.append(Sequence(whole[-context_length - 1 :], scored))
            request_of.append(index)
    return sequences, request_of, Truncated(contexts, continuations)


def _windows(
    context: NDArray[np.int32], continuation: NDArray[np.int32], context_length: int, rolling: bool
) -> Iterable[tuple[Any, Any]]:
    if not rolling:
        return [(context, continuation)]
    pieces = get_rolling_token_windows(continuation.tolist(), int(context[0]), context_length, 1)
    return [(np.array(head, np.int32), np.array(part, np.int32)) for head, part in map(make_disjoint_window, pieces)]
