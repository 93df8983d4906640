"""The plan: what decides the outcome of a preparation, and its tasks, derived from the input alone."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mobillama.data.archives import COMPRESSED
from mobillama.data.documents import Piece, Reading, format_of, hub_address, hub_commit, hub_dataset, source_files
from mobillama.data.prepare.stages import Progress
from mobillama.data.tokenizer import Tokenizer, tokenizer_digest
from mobillama.errors import UsageError
from mobillama.recipe import PrepareRecipe, SourceConfig
from mobillama.record.files import read_json, sha256_file, sha256_json, write_json

_TASK_BYTES = 64 << 20
_TASK_FILES = 4096


@dataclass(frozen=True)
class ReadTask:
    """Pieces of one source that a task reads, and their bytes on disk."""

    source: int
    pieces: tuple[Piece, ...]
    bytes: int


@dataclass(frozen=True)
class Input:
    """A raw file (or a hub data set's shard): where it is, its name within the source, size and time (None: a shard)."""

    path: str
    name: str
    bytes: int
    time: int | None


def pin_revisions(recipe: PrepareRecipe) -> PrepareRecipe:
    """Return a recipe whose hub sources name commits, so that every task and restart reads the same.

    Raises:
        UsageError: a data set cannot be found or reached.
    """
    sources = {
        name: replace(source, revision=hub_commit(source)) if source.format == "huggingface" else source
        for name, source in recipe.sources.items()
    }
    return replace(recipe, sources=sources)


def find_inputs(recipe: PrepareRecipe) -> list[list[Input]]:
    """Return the raw files of every source, in order.

    Raises:
        UsageError: a source has none.
    """
    return [_inputs_of(source, name) for name, source in recipe.sources.items()]


def _inputs_of(source: SourceConfig, name: str) -> list[Input]:
    if source.format == "huggingface":
        # A shard's path is what opens it; its bytes are unknown before it is read.
        shards = hub_dataset(source).num_shards
        return [Input(hub_address(source, shards), f"shard {i}", 0, None) for i in range(shards)]
    root = Path(source.path)
    inputs = []
    for file in source_files(source, name):
        within = file.relative_to(root).as_posix() if root.is_dir() else file.name  # no machine's paths
        state = file.stat()
        inputs.append(Input(str(file.absolute()), within, state.st_size, state.st_mtime_ns))
    return inputs


def describe_inputs(
    recipe: PrepareRecipe,
    tokenizer: Tokenizer,
    inputs: list[list[Input]],
    cache: Path | None,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Return everything that decides the outcome: settings, tokenizer, and the raw files by content.

    Args:
        recipe: the preparation.
        tokenizer: its tokenizer.
        inputs: from :func:`find_inputs`.
        cache: file that remembers the hashes of unchanged files (by size and time), or None.
        workers: files hashed at a time.
        progress: told the bytes hashed.
    """
    digests = _digests([file for files in inputs for file in files], cache, workers, progress)
    sources = []
    for (name, source), files in zip(recipe.sources.items(), inputs, strict=True):
        settings = asdict(source)
        if source.format != "huggingface":
            del settings["path"]
        elif Path(source.path).is_dir():
            settings["sha256"] = _directory_digest(Path(source.path))
        described: list[dict[str, Any]] = [
            {"name": file.name, "bytes": file.bytes, "sha256": digests[file.path]}
            if file.time is not None
            else {"name": file.name}
            for file in files
        ]
        sources.append({"name": name, **settings, "files": described})
    return {
        "sequence_length": recipe.sequence_length,
        "holdout": recipe.holdout,
        "chunks": recipe.chunks,
        "seed": recipe.seed,
        "max_document_bytes": recipe.max_document_bytes,
        "long_documents": recipe.long_documents,
        "bad_documents": recipe.bad_documents,
        "tokenizer": tokenizer_digest(tokenizer),
        "tokenizer_file": sha256_file(tokenizer.path),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "sources": sources,
    }


def _digests(files: list[Input], cache: Path | None, workers: int, progress: Progress) -> dict[str, str]:
    known = read_json(cache) if cache and cache.is_file() else {}
    total, done = sum(file.bytes for file in files), 0
    digests: dict[str, str] = {}

    def digest(file: Input) -> tuple[Input, str]:
        size, time, sha256 = known.get(file.path, (0, 0, ""))
        return file, sha256 if (size, time) == (file.bytes, file.time) else sha256_file(Path(file.path))

    with ThreadPoolExecutor(workers) as pool:
        for file, sha256 in pool.map(digest, [file for file in files if file.time is not None]):
            digests[file.path] = sha256
            done += file.bytes
            progress("hash raw files", done, total)
    if cache:
        write_json(cache, {f.path: [f.bytes, f.time, digests[f.path]] for f in files if f.time is not None})
    return digests


def _directory_digest(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return sha256_json({path.relative_to(directory).as_posix(): sha256_file(path) for path in files})


def check_unchanged(
    recipe: PrepareRecipe, tokenizer: Tokenizer, inputs: list[list[Input]], described: dict[str, Any]
) -> None:
    """Check that what was read is what was described: raw files by size and time, the rest by content.

    Args:
        recipe: the preparation.
        tokenizer: its tokenizer.
        inputs: from :func:`find_inputs`.
        described: from :func:`describe_inputs`.

    Raises:
        UsageError: something changed; the message names it.
    """
    changed = [file.path for files in inputs for file in files if file.time is not None and not _is_as_found(file)]
    for source, settings in zip(recipe.sources.values(), described["sources"], strict=True):
        if "sha256" in settings and _directory_digest(Path(source.path)) != settings["sha256"]:
            changed.append(source.path)
    if not tokenizer.path.is_file() or sha256_file(tokenizer.path) != described["tokenizer_file"]:
        changed.append(str(tokenizer.path))
    if changed:
        raise UsageError(f"{changed[0]}: changed while it was read; leave it alone and run this again")


def _is_as_found(file: Input) -> bool:
    path = Path(file.path)
    return path.exists() and (path.stat().st_size, path.stat().st_mtime_ns) == (file.bytes, file.time)


def readings(recipe: PrepareRecipe, vocab_size: int) -> list[Reading]:
    """Return how each source is read."""
    return [
        Reading(
            format=source.format,
            text_field=source.text_field,
            label=source.subset,
            sequence_length=recipe.sequence_length,
            vocab_size=vocab_size,
            max_bytes=recipe.max_document_bytes,
            split_long=recipe.long_documents == "split",
            skip_bad=recipe.bad_documents == "skip",
        )
        for source in recipe.sources.values()
    ]


def read_tasks(recipe: PrepareRecipe, inputs: list[list[Input]]) -> list[ReadTask]:
    """Return the tasks of the reading stage: about 64 MiB of files each; plain JSON lines are divided where larger."""
    tasks: list[ReadTask] = []
    for source, (config, files) in enumerate(zip(recipe.sources.values(), inputs, strict=True)):
        waiting: list[tuple[Piece, int]] = []
        for piece, size in _pieces(files, config.format):
            waiting.append((piece, size))
            if sum(size for _, size in waiting) >= _TASK_BYTES or len(waiting) == _TASK_FILES or not size:
                tasks.append(_task(source, waiting))
                waiting = []
        if waiting:
            tasks.append(_task(source, waiting))
    return tasks


def _pieces(files: list[Input], format: str) -> Iterable[tuple[Piece, int]]:
    for number, file in enumerate(files):
        lines = (format_of(Path(file.name)) if format == "auto" else format) in ("jsonl", "amber")
        if not lines or file.path.endswith(COMPRESSED) or file.bytes <= _TASK_BYTES:
            yield Piece(file.path, number), file.bytes
            continue
        for start in range(0, file.bytes, _TASK_BYTES):
            end = min(start + _TASK_BYTES, file.bytes)
            yield Piece(file.path, number, start, end), end - start


def _task(source: int, pieces: list[tuple[Piece, int]]) -> ReadTask:
    return ReadTask(source, tuple(piece for piece, _ in pieces), sum(size for _, size in pieces))
