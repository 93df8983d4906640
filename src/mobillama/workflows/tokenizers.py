"""Training tokenizers and comparing how well they compress: bytes per token, source by source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mobillama.console import note, progress, table
from mobillama.data.documents import read_texts
from mobillama.data.tokenizer import id_type, load_tokenizer, train_tokenizer
from mobillama.errors import UsageError


def train_and_compare(texts: list[Path], vocab_size: int, megabytes: int, out: Path, others: list[Path]) -> None:
    """Train a tokenizer on the first ``megabytes`` of the texts, an equal part of each, and report its compression.

    Raises:
        UsageError: there is no text, or too little for the vocabulary.
    """
    for other in others:
        load_tokenizer(other)  # a wrong path is told before the work
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress() as show:

        def sampled() -> Iterator[str]:
            for number, path in enumerate(texts):
                show(f"read texts: {path.name}", number, len(texts))
                yield from _first(path, megabytes * 1_000_000 // len(texts))
            show("read texts", len(texts), len(texts))
            note(f"learning {vocab_size:,} pieces …")

        tokenizer = train_tokenizer(sampled(), vocab_size, out)
    note(f"{out}: {tokenizer.vocab_size:,} ids")
    show_compression([out, *others], texts, 20)


def show_compression(tokenizers: list[Path], texts: list[Path], megabytes: int) -> None:
    """Print the bytes per token of each tokenizer on the first ``megabytes`` of each source, and over all of them.

    Raises:
        UsageError: a tokenizer or text is missing.
    """
    loaded = [load_tokenizer(path) for path in tokenizers]
    rows = []
    total_bytes, total_tokens = 0, [0] * len(loaded)
    with progress() as show:
        for number, path in enumerate(texts):
            show("count tokens", number, len(texts))
            sample = list(_first(path, megabytes * 1_000_000))
            size = sum(len(text.encode("utf-8")) for text in sample)
            if not size:
                raise UsageError(f"{path}: holds no text")
            counts = [
                sum(map(len, tokenizer.encode_packed(sample))) // id_type(tokenizer.vocab_size).itemsize
                for tokenizer in loaded
            ]
            rows.append((path.name, f"{size / 1e6:.1f}", *(f"{size / count:.3f}" for count in counts)))
            total_bytes += size
            total_tokens = [total + count for total, count in zip(total_tokens, counts, strict=True)]
        show("count tokens", len(texts), len(texts))
    rows.append(("all", f"{total_bytes / 1e6:.1f}", *(f"{total_bytes / total:.3f}" for total in total_tokens)))
    names = [f"{path.stem} ({tokenizer.vocab_size:,})" for path, tokenizer in zip(tokenizers, loaded, strict=True)]
    table("bytes per token", ["source", "MB", *names], rows)


def _first(path: Path, budget: int) -> Iterator[str]:
    """Yield the texts of a source until ``budget`` bytes are given."""
    for text in read_texts([path]):
        yield text
        budget -= len(text.encode("utf-8"))
        if budget <= 0:
            return
