"""Support of benchmarks/data.py: the peers, each of which returns its seconds and its tokens; and the memory of a tree of
processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_BATCH_CHARACTERS = 16_000_000
_GROUP_LENGTH = 2049
_SAMPLE_SECONDS = 0.05


def sentencepiece_seconds(model: Path, texts: list[str], processes: int) -> tuple[float, int]:
    """Return how long sentencepiece takes over texts in memory, and the number of ids."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    return _timed(len(ids) for batch in _batches(texts) for ids in processor.encode(batch, num_threads=processes))


def tokenizers_seconds(description: Path, texts: list[str], processes: int) -> tuple[float, int]:
    """Return how long Hugging Face tokenizers takes over texts in memory, and the number of ids."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(processes)}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(description))
    return _timed(
        len(encoding.ids)
        for batch in _batches(texts)
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    )


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Cut texts into batches that fit memory beside their ids, and keep all threads busy."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _timed(counts: Iterable[int]) -> tuple[float, int]:
    started = time.perf_counter()
    total = sum(counts)
    return time.perf_counter() - started, total


def datatrove_seconds(folder: Path, description: Path, out: Path, processes: int) -> tuple[float, int]:
    """Return how long datatrove takes from .jsonl files to one shuffled file of ids, and the number of ids."""
    # A thread each, as many in all as the others have.
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
    from loguru import logger

    logger.remove()
    files = len(list(folder.rglob("*.jsonl")))
    parts, merged = str(out / "parts"), out / "merged"
    tokenize = DocumentTokenizer(parts, str(description), eos_token="</s>", seed=0)
    merge = DocumentTokenizerMerger(parts, str(merged), "all", seed=0, progress=False)
    started = time.perf_counter()
    LocalPipelineExecutor(
        [JsonlReader(str(folder)), tokenize], tasks=files, workers=min(processes, files), logging_dir=str(out / "logs")
    ).run()
    LocalPipelineExecutor([merge], logging_dir=str(out / "merge-logs")).run()
    seconds = time.perf_counter() - started
    return seconds, sum(path.stat().st_size for path in merged.glob("*.ds")) // 2


def datasets_seconds(folder: Path, description: Path, out: Path, processes: int) -> tuple[float, int]:
    """Return how long a plain ``datasets`` pipeline takes from .jsonl files to saved sequences, and the number of ids."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    import datasets

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in folder.rglob("*.jsonl"))
    started = time.perf_counter()
    data: Any = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"))
    data = data.map(
        _tokenize, fn_kwargs={"path": str(description)}, batched=True, num_proc=processes, remove_columns=["text"]
    )
    data = data.map(_group, batched=True, num_proc=processes)
    data.save_to_disk(out / "saved", num_proc=processes)
    return time.perf_counter() - started, len(data) * _GROUP_LENGTH


_LOADED: dict[str, Callable[[list[str]], list[list[int]]]] = {}


def _tokenize(rows: dict[str, list[str]], path: str) -> dict[str, list[list[int]]]:
    if path not in _LOADED:  # once in each process
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        end = [tokenizer.token_to_id("</s>")]
        _LOADED[path] = lambda texts: [
            encoding.ids + end for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
    return {"input_ids": _LOADED[path](rows["text"])}


def _group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    joined = [i for ids in rows["input_ids"] for i in ids]
    ends = range(_GROUP_LENGTH, len(joined) + 1, _GROUP_LENGTH)
    return {"input_ids": [joined[end - _GROUP_LENGTH : end] for end in ends]}


def watch_memory(work: Path, target: Callable[..., Any], *args: Any) -> dict[str, dict[str, int]]:
    """Run a function in a process of its own; return the peaks in bytes of it and all below it, for each stage.

    ``rss`` counts a shared page in every process, ``pss`` once in all, ``anonymous`` without what is mapped from files;
    ``largest`` is the RSS of the largest process. A stage is a folder of ``work/stages``; ``other`` is what lies between.
    """
    peaks: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("rss", "pss", "anonymous", "largest"), 0))
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    while process.is_alive():
        stages = [path for path in (work / "stages").glob("*") if not (path / "done").exists()]
        each = [_memory(pid) for pid in _tree(process.pid or 0)]
        peak = peaks[stages[0].name if stages else "other"]
        for name, field in (("rss", "Rss"), ("pss", "Pss"), ("anonymous", "Pss_Anon")):
            peak[name] = max(peak[name], sum(memory.get(field, 0) for memory in each))
        peak["largest"] = max(peak["largest"], *(memory.get("Rss", 0) for memory in each), 0)
        time.sleep(_SAMPLE_SECONDS)
    if process.exitcode:
        raise SystemExit(f"the measured process ended with {process.exitcode}")
    return dict(peaks)


def _tree(root: int) -> list[int]:
    """Return a process and all below it."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        children[parent].append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def _memory(pid: int) -> dict[str, int]:
    """Return a process's memory in bytes by the names of smaps_rollup."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it ended meanwhile
        return {}
    return {name.rstrip(":"): int(kib) << 10 for name, kib, _ in map(str.split, lines)}
