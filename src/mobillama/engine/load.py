"""Opening a deployed model: its engine and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from mobillama.data.tokenizer import JSON_FILE, Tokenizer, load_tokenizer
from mobillama.engine.interface import Engine
from mobillama.errors import UsageError


def load_engine(directory: Path) -> tuple[Engine, Tokenizer]:
    """Return the engine and tokenizer of a model directory.

    Raises:
        UsageError: this is no model directory, or its tokenizer is missing or has another vocabulary.
        CorruptDataError: it is damaged.
    """
    from mobillama.engine.torch_engine import TorchEngine

    engine = TorchEngine.from_directory(directory)
    if not (directory / JSON_FILE).is_file():
        raise UsageError(f"{directory}: no {JSON_FILE} there; copy the model's tokenizer beside its weights")
    tokenizer = load_tokenizer(directory / JSON_FILE)
    if tokenizer.vocab_size != engine.vocab_size:
        raise UsageError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model {engine.vocab_size}; "
            "put the model's own tokenizer beside it"
        )
    return engine, tokenizer
