"""Preparation: documents → ids + end mark → sequences cut across document borders → hold-out → ordered chunks.

The pipeline of LLM360's Amber (section 3.3 of the paper): no begin mark, an end mark after every document, each source
packed on its own, the remainder of a source dropped (and counted).
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.documents import Document, read_documents, source_files
from mobillama.data.layout import Layout, SourceCount
from mobillama.data.store import id_type, write_sequences
from mobillama.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, tokenizer_digest
from mobillama.errors import UsageError
from mobillama.recipe import PrepareRecipe, SourceConfig
from mobillama.record.files import new_directory, sha256_file
from mobillama.record.manifest import MANIFEST_NAME, read_manifest, write_manifest
from mobillama.record.merkle import merkle_root

FORMAT = "mobillama-dataset-1"

# Of a document: where its ids end in its source's stream, its file (index into the manifest), its line, and the first
# half of its text's sha256.
DOCUMENT = np.dtype([("end", "<u8"), ("file", "<u4"), ("line", "<u4"), ("digest", "u1", (16,))])

_DOCUMENTS_AT_ONCE = 512
_ROWS_AT_ONCE = 1024

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def prepare(recipe: PrepareRecipe, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Prepare a data set in ``out`` and return its manifest; an equal one that is already there is kept.

    Args:
        recipe: what to prepare.
        progress: told (stage, done, total) as it goes.

    Raises:
        UsageError: a source is missing, empty or shorter than one sequence; ``out`` holds something else or cannot be
            written.
        CorruptDataError: a document cannot be read.
    """
    tokenizer = load_tokenizer(Path(recipe.tokenizer))
    files = {name: source_files(Path(source.path), name) for name, source in recipe.sources.items()}
    inputs = _describe_inputs(recipe, tokenizer, files)
    if out.exists():
        return _existing(out, inputs)
    try:
        with new_directory(out) as work:
            return _prepare_into(work, recipe, tokenizer, files, inputs, progress)
    except OSError as error:
        where = error.filename or out
        raise UsageError(f"{where}: {error.strerror}; free space, or choose another place") from None


def _describe_inputs(recipe: PrepareRecipe, tokenizer: Tokenizer, files: dict[str, list[Path]]) -> dict[str, Any]:
    """Return everything that decides the outcome: settings, tokenizer, and the raw files by content."""
    return {
        "sequence_length": recipe.sequence_length,
        "holdout": recipe.holdout,
        "chunks": recipe.chunks,
        "seed": recipe.seed,
        "tokenizer": tokenizer_digest(tokenizer),
        "tokenizer_file": sha256_file(tokenizer.path),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "sources": [
            {
                "name": name,
                "licence": source.licence,
                "text_field": source.text_field,
                "files": [
                    {"name": _name_within(source, file), "bytes": file.stat().st_size, "sha256": sha256_file(file)}
                    for file in files[name]
                ],
            }
            for name, source in recipe.sources.items()
        ],
    }


def _name_within(source: SourceConfig, file: Path) -> str:
    """Return a file's path within its source's directory: no machine's paths, and no two names alike."""
    root = Path(source.path)
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def _existing(out: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    if not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and is no prepared data; choose another --out")
    manifest = read_manifest(out, FORMAT)
    for key, value in inputs.items():
        if manifest["inputs"].get(key) != value:
            raise UsageError(f"{out}: was prepared with another '{key}'; choose another --out or remove it")
    return manifest


def _prepare_into(
    work: Path,
    recipe: PrepareRecipe,
    tokenizer: Tokenizer,
    files: dict[str, list[Path]],
    inputs: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    for name in ("documents", "holdout", "train", "streams"):
        (work / name).mkdir(parents=True)
    dtype = id_type(tokenizer.vocab_size)
    facts = []
    for name, source in recipe.sources.items():
        stream = _tokenise(name, source, files[name], tokenizer, work, dtype, progress)
        facts.append(_count(name, stream, recipe))
    counts = [SourceCount(fact["name"], fact["sequences"], fact["holdout_sequences"]) for fact in facts]
    tables = [work / "documents" / f"{fact['name']}.npy" for fact in facts]
    corpus_root = merkle_root([bytes.fromhex(sha256_file(table)) for table in tables])
    layout = Layout(corpus_root, recipe.seed, counts)
    if layout.train_size < recipe.chunks:
        raise UsageError(
            f"chunks: {recipe.chunks} chunks cannot be filled from {layout.train_size} training sequences; "
            f"use at most {layout.train_size}, or more text"
        )
    streams = [
        _sequences(work / "streams" / f"{c.name}.bin", dtype, c.sequences, recipe.sequence_length) for c in counts
    ]
    holdout = _write_holdout(work, layout, streams, dtype, recipe.sequence_length)
    chunks = _write_chunks(work, layout, streams, dtype, recipe, progress)
    del streams
    shutil.rmtree(work / "streams")
    save_tokenizer(tokenizer, work / "tokenizer")
    return write_manifest(
        work,
        {
            "format": FORMAT,
            "inputs": inputs,
            "dtype": dtype.str,
            "sources": facts,
            "train_sequences": layout.train_size,
            "corpus_root": corpus_root.hex(),
            "root": merkle_root([bytes.fromhex(chunk["root"]) for chunk in chunks]).hex(),
            "chunks": chunks,
            "holdout": holdout,
        },
    )


def _tokenise(
    name: str,
    source: SourceConfig,
    files: list[Path],
    tokenizer: Tokenizer,
    work: Path,
    dtype: np.dtype[np.unsignedinteger],
    progress: Progress,
) -> dict[str, Any]:
    """Write a source's stream of ids and its table of documents; return its counts."""
    total_files = len(files)
    records: list[NDArray[np.void]] = []
    tokens = text_bytes = documents = 0
    with open(work / "streams" / f"{name}.bin", "wb") as stream:
        for batch in _batches(read_documents(files, source.text_field), _DOCUMENTS_AT_ONCE):
            table = np.zeros(len(batch), DOCUMENT)
            for row, (document, ids) in enumerate(zip(batch, tokenizer.encode([d.text for d in batch]), strict=True)):
                np.array([*ids, tokenizer.eos_id], dtype=dtype).tofile(stream)
                tokens += len(ids) + 1
                text_bytes += len(document.raw)
                digest = np.frombuffer(hashlib.sha256(document.raw).digest()[:16], np.uint8)
                table[row] = (tokens, document.file, document.line, digest)
            records.append(table)
            documents += len(batch)
            progress(f"tokenise {name}: {documents:,} documents", batch[-1].file, total_files)
    progress(f"tokenise {name}: {documents:,} documents", total_files, total_files)
    if not documents:
        raise UsageError(f"sources.{name}: holds no document with text; remove the source or mend its path")
    np.save(work / "documents" / f"{name}.npy", np.concatenate(records))
    return {"name": name, "documents": documents, "bytes": text_bytes, "tokens": tokens}


def _count(name: str, facts: dict[str, Any], recipe: PrepareRecipe) -> dict[str, Any]:
    """Add to a source's counts how many sequences it gives and how many of them are held out."""
    sequences, dropped = divmod(facts["tokens"], recipe.sequence_length)
    held = recipe.holdout * sequences if recipe.holdout < 1 else recipe.holdout
    holdout = min(sequences, max(1, round(held))) if recipe.holdout else 0
    if sequences - holdout < 1:
        raise UsageError(
            f"sources.{name}: {facts['tokens']} tokens give {sequences} sequences of {recipe.sequence_length}, of which "
            f"{holdout} are to be held out; nothing is left to train on: use more text, a shorter sequence_length or "
            "a smaller holdout"
        )
    return {**facts, "dropped_tokens": dropped, "sequences": sequences, "holdout_sequences": holdout}


def _sequences(path: Path, dtype: np.dtype[np.unsignedinteger], rows: int, length: int) -> NDArray[np.unsignedinteger]:
    return np.memmap(path, dtype=dtype, mode="r", shape=(rows, length))


def _write_holdout(
    work: Path,
    layout: Layout,
    streams: list[NDArray[np.unsignedinteger]],
    dtype: np.dtype[np.unsignedinteger],
    length: int,
) -> list[dict[str, Any]]:
    written = []
    for index, source in enumerate(layout.sources):
        path = work / "holdout" / f"{source.name}.npy"
        rows = layout.holdout_sequences(index)
        root = write_sequences(path, (len(rows), length), dtype, [streams[index][rows]])
        written.append({"file": f"holdout/{path.name}", "source": source.name, "rows": len(rows), "root": root.hex()})
    return written


def _write_chunks(
    work: Path,
    layout: Layout,
    streams: list[NDArray[np.unsignedinteger]],
    dtype: np.dtype[np.unsignedinteger],
    recipe: PrepareRecipe,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Deal the training rows to chunks in their final order; sizes differ by one at most."""
    borders = np.linspace(0, layout.train_size, recipe.chunks + 1).astype(np.int64)
    written = []
    for number, (start, end) in enumerate(itertools.pairwise(borders.tolist())):
        path = work / "train" / f"chunk-{number:05d}.npy"
        starts = range(start, end, _ROWS_AT_ONCE)
        blocks = (_gather(layout, streams, first, min(first + _ROWS_AT_ONCE, end)) for first in starts)
        root = write_sequences(path, (end - start, recipe.sequence_length), dtype, blocks)
        written.append({"file": f"train/{path.name}", "rows": end - start, "root": root.hex()})
        progress("write chunks", number + 1, recipe.chunks)
    return written


def _gather(
    layout: Layout, streams: list[NDArray[np.unsignedinteger]], start: int, end: int
) -> NDArray[np.unsignedinteger]:
    source, sequence = layout.train_origin(np.arange(start, end))
    rows = np.empty((end - start, streams[0].shape[1]), dtype=streams[0].dtype)
    for index in np.unique(source):
        chosen = source == index
        rows[chosen] = streams[index][sequence[chosen]]
    return rows


def _batches(items: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
