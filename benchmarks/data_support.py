"""Support of benchmarks/data.py: the texts; the peers, which return their seconds and their tokens; memory of processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobillama.data.documents import Document, Piece, Reading, read_piece
from mobillama.record.files import read_json, write_json

SOURCES = ("arxiv", "book", "c4", "refinedweb", "starcoderdata", "stackexchange", "wikipedia")

_BATCH_CHARACTERS = 16_000_000
_GROUP_LENGTH = 2049
_SAMPLE_SECONDS = 0.05


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Text:
    """The compared text: the first megabytes of every source as plain .jsonl files, as many a source as processes.

    Args:
        corpus: folder of ``NAME.jsonl.xz``.
        folder: where the files are written, or were before.
        megabytes: text of each source.
        files: number of files of each source.
    """

    def __init__(self, corpus: Path, folder: Path, megabytes: int, files: int) -> None:
        self.folder, facts = folder, folder / "facts.json"
        if not facts.exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_json(facts, {source: self._cut(corpus, source, megabytes * 10**6, files) for source in SOURCES})
        self.megabytes = sum(read_json(facts).values()) / 1e6

    def _cut(self, corpus: Path, source: str, size: int, files: int) -> int:
        (self.folder / source).mkdir(parents=True)
        sizes = itertools.accumulate(len(document.raw) for document in corpus_documents(corpus, source))
        count = sum(1 for _ in itertools.takewhile(lambda before: before < size, itertools.chain([0], sizes)))
        chosen = list(itertools.islice(corpus_documents(corpus, source), count))
        for number in range(files):
            write_texts(self.folder / source / f"{number}.jsonl", (d.text for d in chosen[number::files]))
        return sum(len(document.raw) for document in chosen)

    def texts(self) -> list[str]:
        """Return all texts."""
        files = sorted(self.folder.rglob("*.jsonl"))
        return [document.text for file in files for document in read_piece(Piece(str(file), 0), Reading())]


def corpus_documents(corpus: Path, source: str) -> Iterator[Document]:
    """Yield the documents of a source of the corpus."""
    return read_piece(Piece(str(corpus / f"{source}.jsonl.xz"), 0), Reading())


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write texts as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def write_noisy(corpus: Path, folder: Path, size: int) -> None:
    """Write the corpus again and again, a new word in every document, until it is ``size`` bytes, a file each time."""
    random.seed(0)
    sources = {source: list(corpus_documents(corpus, source)) for source in SOURCES}
    whole = sum(len(document.raw) for documents in sources.values() for document in documents)
    for source, documents in sources.items():
        (folder / source).mkdir()
        for number in range(-(-size // whole)):
            share = min(1.0, size / whole - number)
            part = documents[: max(1, round(share * len(documents)))]
            write_texts(folder / source / f"{number:03d}.jsonl", (_with_noise(document.text) for document in part))


def _with_noise(text: str) -> str:
    place = text.find(" ", random.randrange(len(text) + 1)) + 1
    return f"{text[:place]}{random.getrandbits(40):x} {text[place:]}"


def sentencepiece_seconds(model: Path, texts: list[str], processes: int) -> tuple[float, int]:
    """Return how long sentencepiece takes over texts in memory, and the number of ids, end marks too."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    return _timed(len(ids) + 1 for batch in _batches(texts) for ids in processor.encode(batch, num_threads=processes))


def tokenizers_seconds(description: Path, texts: list[str], processes: int) -> tuple[float, int]:
    """Return how long Hugging Face tokenizers takes over texts in memory, and the number of ids, end marks too."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(processes)}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(description))
    tokenizer.encode_special_tokens = True  # else a text that spells "<s>" gets other ids than sentencepiece's
    return _timed(
        len(encoding.ids) + 1
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
    """Return how long datatrove takes from .jsonl files to one shuffled file of ids, and the number of ids, end marks too."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread for each process, as many in all as the others have
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    files, out = len(list(folder.rglob("*.jsonl"))), fresh(out)
    parts, merged = str(out / "parts"), out / "merged"
    tokenize = DocumentTokenizer(parts, str(description), eos_token="</s>", seed=0)
    merge = DocumentTokenizerMerger(parts, str(merged), "all", seed=0, progress=False)
    with _errors_to(out / "log"):
        started = time.perf_counter()
        LocalPipelineExecutor(
            [JsonlReader(str(folder)), tokenize], tasks=files, workers=processes, logging_dir=str(out / "logs")
        ).run()
        LocalPipelineExecutor([merge], logging_dir=str(out / "merge-logs")).run()
        seconds = time.perf_counter() - started
    tokens = sum(path.stat().st_size for path in merged.glob("*.ds")) // 2
    shutil.rmtree(out)
    return seconds, tokens


@contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    """Send what this process and its children say on standard error to a file."""
    before = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def datasets_seconds(folder: Path, description: Path, out: Path, processes: int) -> tuple[float, int]:
    """Return how long a plain ``datasets`` pipeline takes from .jsonl files to saved sequences, and the number of their ids."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets

    datasets.disable_progress_bars()
    out = fresh(out)
    files = sorted(str(path) for path in folder.rglob("*.jsonl"))
    started = time.perf_counter()
    data: Any = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"))
    data = data.map(
        _tokenize, fn_kwargs={"path": str(description)}, batched=True, num_proc=processes, remove_columns=["text"]
    )
    data = data.map(_group, batched=True, num_proc=processes)
    data.save_to_disk(out / "saved", num_proc=processes)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds, len(data) * _GROUP_LENGTH


_LOADED: dict[str, Callable[[list[str]], list[list[int]]]] = {}


def _tokenize(rows: dict[str, list[str]], path: str) -> dict[str, list[list[int]]]:
    if path not in _LOADED:  # once in each process
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        tokenizer.encode_special_tokens = True
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
