"""The hold-out in bits per byte: a model beside compressors and n-gram models, on the very same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.dataset import Dataset
from mobillama.data.tokenizer import load_tokenizer, tokenizer_digest
from mobillama.directory import load_model
from mobillama.errors import UsageError
from mobillama.evaluate.baselines import (
    KneserNeyTrigram,
    byte_trigram_bits_per_byte,
    gzip_bits_per_byte,
    xz_bits_per_byte,
)
from mobillama.train.device import choose_device
from mobillama.train.objective import Objective
from mobillama.train.validation import combined, validate
from mobillama.train.world import World


def evaluate_heldout(
    model_directory: Path,
    dataset: Dataset,
    device: str = "auto",
    limit: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return a model's loss on the hold-out: overall and by source.

    Raises:
        UsageError: the model's tokenizer is not the data set's, nothing is held out, or ``limit`` is negative.
    """
    if limit < 0:
        raise UsageError(f"--limit: {limit} is negative; 0 takes the whole hold-out")
    chosen = choose_device(device)
    model = load_model(model_directory, device=chosen)
    if tokenizer_digest(load_tokenizer(model_directory)) != dataset.manifest["inputs"]["tokenizer"]:
        raise UsageError(
            f"{model_directory}: has another tokenizer than {dataset.path}; use the data it was trained on"
        )
    objective = Objective(model)
    losses = validate(lambda ids, marks: objective(ids, marks)[1], dataset, World(0, 1, 1, chosen), 8, limit, progress)
    if not losses:
        raise UsageError(f"{dataset.path}: nothing is held out; prepare it with holdout above 0")
    return {
        "bits_per_byte": combined(losses).bits_per_byte,
        "loss": combined(losses).loss,
        "tokens": combined(losses).tokens,
        "bytes": combined(losses).bytes,
        "bits_per_byte_by_source": {name: loss.bits_per_byte for name, loss in losses.items()},
    }


def evaluate_baselines(dataset: Dataset, limit: int = 0) -> dict[str, float]:
    """Return what compressors and n-gram models reach, in bits per byte of the hold-out's scored text.

    The compressors see only that text. The n-gram models are trained on all training sequences, held in memory.
    """
    held = np.concatenate([dataset.holdout(name, limit) for name in dataset.source_names])
    trained = dataset.read(np.arange(dataset.size))
    text = _text(dataset, held[:, 1:])
    return {
        "gzip -9": gzip_bits_per_byte(text),
        "xz -9": xz_bits_per_byte(text),
        "byte 3-gram": byte_trigram_bits_per_byte(_text(dataset, trained), text),
        "Kneser-Ney token 3-gram": KneserNeyTrigram(trained, dataset.vocab_size).bits_per_byte(held, len(text)),
    }


def _text(dataset: Dataset, ids: NDArray[np.int64]) -> bytes:
    table = dataset.tokenizer.token_bytes
    return b"".join([table[i] for i in ids.ravel().tolist()])
