"""Training a tokenizer on texts."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mobillama.data.tokenizer import SentencePieceTokenizer
from mobillama.errors import UsageError
from mobillama.record.files import replaced_file


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> SentencePieceTokenizer:
    """Train a LLaMA-type BPE with byte fallback (sentencepiece) and write it to ``path``.

    Digits are split, whitespace is kept as it is, ids 0, 1, 2 are unknown, begin and end. The same texts give the same
    file.

    Raises:
        UsageError: the texts are too few for the vocabulary.
        Exception: whatever reading the texts raises.
    """
    import sentencepiece

    lines = _Lines(texts)
    model = io.BytesIO()  # written here, since a file's name would become part of the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=65536,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        if not lines.count:
            raise UsageError("texts: hold no text; give files with documents") from None
        most, least = (re.search(pattern, str(error)) for pattern in (r"<= (\d+)", r"required_chars\. \d+ vs (\d+)"))
        bound = f"at most {most[1]}" if most else f"at least {least[1]}" if least else str(error)
        raise UsageError(f"no vocabulary of {vocab_size} ids can be made of these texts: {bound}") from None
    with replaced_file(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


class _Lines:
    """Lines for sentencepiece, which hides what its iterator raises: the error is kept for the caller."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count = texts, 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                for line in text.split("\n"):
                    if line.strip():
                        self.count += 1
                        yield line
        except Exception as error:
            self.error = error
            raise
