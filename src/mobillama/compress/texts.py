"""Real text as ids: what a model is calibrated on, and what it is judged on. The two never overlap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobillama.data.dataset import Dataset
from mobillama.data.documents import read_texts
from mobillama.data.tokenizer import Tokenizer, tokenizer_digest
from mobillama.deploy.parity import texts as sample_texts
from mobillama.errors import UsageError
from mobillama.record.manifest import MANIFEST_NAME

LONGEST = 2048  # tokens of a sequence
HELD_OUT_TOKENS = 16_384
_DRAWN_FROM = 4  # times as much text as is asked for
_BATCH = 64  # documents tokenised at once


@dataclass(frozen=True)
class Texts:
    """Ids of real text, in sequences of one length."""

    name: str
    """Where it comes from."""
    calibration_nt: NDArray[np.int64]
    """Sequences to calibrate on."""
    held_out: dict[str, NDArray[np.int64]]
    """By source, sequences (n, t + 1) to judge on; the first id of each is context only."""


def find_texts(
    path: Path | None, tokenizer: Tokenizer, context: int, sequences: int, seed: int, held_out: int = HELD_OUT_TOKENS
) -> Texts:
    """Return ids to calibrate and to judge on.

    Args:
        path: prepared data, whose training sequences and hold-out are taken; or a text (text, JSON lines, Parquet, or a
            directory of them), whose beginning is held out; None: the packaged sample corpus.
        tokenizer: the model's.
        context: tokens that the model takes; sequences have at most 2,048.
        sequences: to calibrate on; there may be fewer.
        seed: of the draw.
        held_out: tokens to judge on; at most an eighth of a text.

    Raises:
        UsageError: there is no such text, its ids are another tokenizer's, or it is too short for two sequences.
    """
    length = min(context, LONGEST)
    if path is not None and (path / MANIFEST_NAME).is_file():
        return _of_data(Dataset(path), tokenizer, length, sequences, seed, held_out)
    if path is not None and not path.exists():
        raise UsageError(f"--calibration: {path} does not exist; name prepared data or a text")
    wanted = (_DRAWN_FROM * sequences + -(-held_out // length)) * (length + 1)
    texts = sample_texts() if path is None else read_texts([path])
    rows_nt = _rows(texts, tokenizer, length + 1, wanted)
    if len(rows_nt) < 2:
        raise UsageError(
            f"--calibration: {path} has fewer than the {2 * (length + 1):,} tokens of two sequences; give more text, or leave "
            "it out for the sample corpus"
        )
    # The sample corpus deals its sources out in turn, so its beginning is of all; the check of a written file reads it too.
    judged = max(1, min(-(-held_out // length), len(rows_nt) // 8))
    name = "the sample corpus" if path is None else path.name
    drawn = _draw(len(rows_nt) - judged, sequences, seed)
    return Texts(name, rows_nt[judged:][drawn, :length], {name: rows_nt[:judged]})


def _of_data(data: Dataset, tokenizer: Tokenizer, length: int, sequences: int, seed: int, held_out: int) -> Texts:
    if tokenizer_digest(tokenizer) != data.manifest["inputs"]["tokenizer"]:
        raise UsageError(
            f"--calibration: {data.path} has another tokenizer than the model; give its own data, or a text"
        )
    length = min(length, data.sequence_length - 1)
    names = [name for name in data.source_names if data.holdout_file(name).rows]
    if not names:
        raise UsageError(f"{data.path}: nothing is held out to judge on; prepare it with holdout above 0")
    of_source = max(1, held_out // (length * len(names)))
    judged = {name: data.holdout(name, of_source)[:, : length + 1] for name in names}
    return Texts(data.path.name, data.read(_draw(data.size, sequences, seed))[:, :length], judged)


def _draw(count: int, wanted: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def _rows(texts: Iterable[str], tokenizer: Tokenizer, length: int, wanted: int) -> NDArray[np.int64]:
    """Return the first texts as sequences (n, length), ``wanted`` ids or what there is; end marks stand between documents."""
    ids: list[int] = []
    batch: list[str] = []

    def take() -> None:
        for row in tokenizer.encode(batch):
            ids.extend([*row, tokenizer.eos_id])
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            take()
        if len(ids) >= wanted:
            break
    take()
    whole = min(len(ids), wanted) // length
    return np.array(ids[: whole * length], np.int64).reshape(whole, length)
