"""Training tokenizers and comparing how well they compress: bytes per token, source by source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from mobillama.config import load_recipe
from mobillama.console import note, progress, table
from mobillama.data.documents import read_texts, source_texts
from mobillama.data.tokenizer import id_type, load_tokenizer
from mobillama.data.tokenizer_training import train_tokenizer
from mobillama.errors import UsageError
from mobillama.recipe import PrepareRecipe


def train_and_compare(texts: list[Path], vocab_size: int, megabytes: int, out: Path, others: list[Path]) -> None:
    """Train a tokenizer on the first ``megabytes`` of the texts, an equal part of each, and report its compression.

    Raises:
        UsageError: there is no text, or too little for the vocabulary; ``out`` exists.
    """
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another file or remove it")
    for other in others:
        load_tokenizer(other)  # a wrong path is told before the work
    sources = _sources(texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress() as show:

        def sampled() -> Iterator[str]:
            for number, (name, given) in enumerate(sources):
                show(f"read texts: {name}", number, len(sources))
                yield from _first(given(), megabytes * 1_000_000 // len(sources))
            show("read texts", len(sources), len(sources))
            note(f"learning {vocab_size:,} pieces …")

        tokenizer = train_tokenizer(sampled(), vocab_size, out)
    note(f"{out}: {tokenizer.vocab_size:,} ids")
    show_compression([out, *others], texts, 20)


def show_compression(tokenizers: list[Path], texts: list[Path], megabytes: int) -> None:
    """Print the bytes per token of each tokenizer on the first ``megabytes`` of each source, and over all of them.

    Raises:
        UsageError: a tokenizer or text is missing.
    """
    loaded, sources = [load_tokenizer(path) for path in tokenizers], _sources(texts)
    rows = []
    total_bytes, total_tokens = 0, [0] * len(loaded)
    with progress() as show:
        for number, (name, given) in enumerate(sources):
            show("count tokens", number, len(sources))
            sample = list(_first(given(), megabytes * 1_000_000))
            size = sum(len(text.encode("utf-8")) for text in sample)
            if not size:
                raise UsageError(f"{name}: holds no text")
            counts = [
                sum(map(len, tokenizer.encode_packed(sample))) // id_type(tokenizer.vocab_size).itemsize
                for tokenizer in loaded
            ]
            rows.append((name, f"{size / 1e6:.1f}", *(f"{size / count:.3f}" for count in counts)))
            total_bytes += size
            total_tokens = [total + count for total, count in zip(total_tokens, counts, strict=True)]
        show("count tokens", len(sources), len(sources))
    rows.append(("all", f"{total_bytes / 1e6:.1f}", *(f"{total_bytes / total:.3f}" for total in total_tokens)))
    names = [f"{path.stem} ({tokenizer.vocab_size:,})" for path, tokenizer in zip(tokenizers, loaded, strict=True)]
    table("bytes per token", ["source", "MB", *names], rows)


def _sources(texts: list[Path]) -> list[tuple[str, Callable[[], Iterator[str]]]]:
    """Return each source's name and what reads its texts: a file or directory is one, a recipe names its own."""
    sources: list[tuple[str, Callable[[], Iterator[str]]]] = []
    for path in texts:
        if path.suffix in (".yaml", ".yml"):
            recipe = load_recipe(PrepareRecipe, path)
            skip = recipe.bad_documents == "skip"
            sources += [(name, partial(source_texts, source, name, skip)) for name, source in recipe.sources.items()]
        else:
            sources.append((path.name, partial(read_texts, [path])))
    return sources


def _first(texts: Iterable[str], budget: int) -> Iterator[str]:
    """Yield texts until ``budget`` bytes are given."""
    for text in texts:
        yield text
        budget -= len(text.encode("utf-8"))
        if budget <= 0:
            return
