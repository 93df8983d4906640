"""The data pipeline beside its peers: speed, memory and disk, in one run on one machine.

    python benchmarks/data.py --corpus corpus --tokenizer corpus/llama.model [--part NAME]

Each part runs in a process of its own, prints its rows, and is merged into benchmarks/results/data.json. All compared
parts read the same plain .jsonl files, cut from the corpus beforehand, so that nobody pays for .xz. The part 'memory'
takes long and runs only when it is named. The part 'datatrove' needs orjson (pip install orjson).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from data_support import (
    datasets_seconds,
    datatrove_seconds,
    sentencepiece_seconds,
    tokenizers_seconds,
    watch_memory,
)

from mobillama.config import load_recipe
from mobillama.console import table
from mobillama.data.dataset import PREPARATION_NAME, Dataset
from mobillama.data.documents import Document, Piece, Reading, read_piece
from mobillama.data.layout import Layout, SourceCount
from mobillama.data.prepare.clean import Cleaner
from mobillama.data.prepare.duplicates import signature_step
from mobillama.data.prepare.pipeline import no_progress, prepare
from mobillama.data.prepare.read import Encoder
from mobillama.data.prepare.stages import Execution
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.recipe import CleanConfig, PrepareRecipe, SourceConfig
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json

ROOT = Path(__file__).parents[1]
SOURCES = ("arxiv", "book", "c4", "refinedweb", "starcoderdata", "stackexchange", "wikipedia")
SEQUENCE_LENGTH, CHUNKS = 2049, 36
GIB = 1 << 30


def row(what: str, value: float, unit: str, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """Return a line of the table: what was measured, its target (``least`` or ``most``), and whether that is met."""
    found: dict[str, Any] = {"what": what, "value": float(f"{value:.4g}"), "unit": unit}
    if least is not None or most is not None:
        found["target"] = f"≥ {least:g}" if least is not None else f"≤ {most:g}"
        found["met"] = value >= least if least is not None else value <= (most or 0)
    return found


def show(part: str, result: dict[str, Any]) -> None:
    """Print the rows of a part."""
    lines = []
    for line in result["rows"]:
        verdict = {True: "met", False: "missed", None: ""}[line.get("met")]
        lines.append([line["what"], f"{line['value']:g} {line['unit']}".strip(), line.get("target", ""), verdict])
    table(f"{part}, {result['environment']['date'][:10]}", ["", "measured", "target", ""], lines)


class Text:
    """The compared text: the first megabytes of every source as plain .jsonl files, as many a source as processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder = args.work / f"text-{args.megabytes}-{args.processes}"
        if not (self.folder / "facts.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            sizes = {source: self._cut(args, source) for source in SOURCES}
            write_json(self.folder / "facts.json", sizes)
        self.bytes: dict[str, int] = read_json(self.folder / "facts.json")
        self.megabytes = sum(self.bytes.values()) / 1e6

    def _cut(self, args: argparse.Namespace, source: str) -> int:
        (self.folder / source).mkdir(parents=True)
        files = [open(self.folder / source / f"{n}.jsonl", "w", encoding="utf-8") for n in range(args.processes)]
        size = 0
        for document, file in zip(corpus_documents(args.corpus, source), itertools.cycle(files), strict=False):
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
            size += len(document.raw)
            if size >= args.megabytes * 1e6:
                break
        for file in files:
            file.close()
        return size

    def texts(self) -> list[str]:
        """Return all texts."""
        files = sorted(self.folder.rglob("*.jsonl"))
        return [json.loads(line)["text"] for file in files for line in open(file, encoding="utf-8")]


def corpus_documents(corpus: Path, source: str) -> Iterator[Document]:
    """Yield the documents of a source of the corpus."""
    return read_piece(Piece(str(corpus / f"{source}.jsonl.xz"), 0), Reading())


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def plain_recipe(args: argparse.Namespace, folder: Path, clean: CleanConfig) -> PrepareRecipe:
    """Return the preparation of a folder that holds a folder of every source."""
    sources = {name: SourceConfig(str(folder / name), clean=clean) for name in SOURCES}
    return PrepareRecipe(sources, str(args.tokenizer), sequence_length=SEQUENCE_LENGTH, chunks=CHUNKS)


def prepare_seconds(recipe: PrepareRecipe, out: Path, processes: int) -> float:
    """Prepare anew in ``out``; return the seconds from the first byte read to a finished data set."""
    for path in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)
    started = time.perf_counter()
    prepare(recipe, out, execution=Execution(workers=processes))
    return time.perf_counter() - started


def prepare_plain(args: argparse.Namespace, text: Text) -> tuple[float, dict[str, Any]]:
    """Prepare the compared text without cleaning; return the seconds, and facts beside."""
    out = args.work / "plain"
    seconds = prepare_seconds(plain_recipe(args, text.folder, CleanConfig()), out, args.processes)
    tokens = sum(source["tokens"] for source in Dataset(out).manifest["sources"])
    stages = read_json(out / PREPARATION_NAME)["seconds"]
    return seconds, {"seconds": {"mobillama": seconds}, "tokens": {"mobillama": tokens}, "stages": stages}


def exported_tokenizer(args: argparse.Namespace) -> Path:
    """Return the tokenizer.json that is exported from the sentencepiece model."""
    folder: Path = args.work / "tokenizer"
    save_tokenizer(load_tokenizer(args.tokenizer), folder)
    return folder / "tokenizer.json"


def speeds(facts: dict[str, Any], megabytes: float) -> list[dict[str, Any]]:
    """Return rows with the speed of each."""
    return [row(name, megabytes / seconds, "MB/s") for name, seconds in facts["seconds"].items()]


def part_encoders(args: argparse.Namespace) -> dict[str, Any]:
    """Everything to a finished data set, beside the fastest exact encoders alone with the text in memory."""
    text = Text(args)
    seconds, facts = prepare_plain(args, text)
    texts, description = text.texts(), exported_tokenizer(args)
    peers = {
        "sentencepiece, encoding alone": lambda: sentencepiece_seconds(args.tokenizer, texts, args.processes),
        "tokenizers, encoding alone": lambda: tokenizers_seconds(description, texts, args.processes),
    }
    for name, measure in peers.items():
        facts["seconds"][name], ids = measure()
        facts["tokens"][name] = ids + len(texts)  # with end marks
    sample, tokenizer = texts[:: max(1, len(texts) // 200)], load_tokenizer(args.tokenizer)
    of_json = load_tokenizer(description).encode_packed(sample)
    agree = tokenizer.encode_packed(sample) == of_json == [ids_bytes(ids) for ids in tokenizer.encode(sample)]
    fastest = min(facts["seconds"][name] for name in peers)
    rows = [
        *speeds(facts, text.megabytes),
        row("mobillama / the faster encoder", fastest / seconds, "×", least=0.85),
        row(f"same ids in {len(sample)} texts and same number in all", agree and same(facts["tokens"]), "", least=1),
    ]
    return {"rows": rows, "megabytes": text.megabytes, **facts}


def ids_bytes(ids: list[int]) -> bytes:
    """Return ids packed as LLaMA's 32,000 are stored."""
    return np.array(ids, "<u2").tobytes()


def same(tokens: dict[str, int]) -> bool:
    """Tell whether all counted the same number of tokens."""
    return len(set(tokens.values())) == 1


def part_beside(
    args: argparse.Namespace, name: str, peer: Callable[[Path, Path, Path, int], tuple[float, int]], least: float
) -> dict[str, Any]:
    """Everything to a finished data set, beside a peer that does the same from the same files."""
    text = Text(args)
    seconds, facts = prepare_plain(args, text)
    out = fresh(args.work / name)
    facts["seconds"][name], facts["tokens"][name] = peer(text.folder, exported_tokenizer(args), out, args.processes)
    shutil.rmtree(out)
    rows = [
        *speeds(facts, text.megabytes),
        row(f"mobillama / {name}", facts["seconds"][name] / seconds, "×", least=least),
        row(f"tokens {name} gives", facts["tokens"][name] / facts["tokens"]["mobillama"], "of ours"),
    ]
    return {"rows": rows, "megabytes": text.megabytes, **facts}


def part_cleaning(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe for seven sources with cleaning and near duplicates: its stages, and each step of reading alone."""
    text, out = Text(args), args.work / "cleaned"
    words = [f"--sources.{name}.path={text.folder / name}" for name in SOURCES]
    recipe = load_recipe(
        PrepareRecipe, ROOT / "recipes" / "corpus-local.yaml", [*words, f"--tokenizer={args.tokenizer}"]
    )
    seconds = prepare_seconds(recipe, out, args.processes)
    stages = read_json(out / PREPARATION_NAME)["seconds"]
    rates = step_rates(args)
    rows = [row("all of it", text.megabytes / seconds / args.processes, "MB/s per process")]
    rows += [row(f"share of '{name}'", spent / seconds, "") for name, spent in stages.items()]
    rows += [row(f"c4, one process: {name}", rate, "MB/s") for name, rate in rates.items()]
    return {"rows": rows, "megabytes": text.megabytes, "seconds": seconds, "stages": stages, "rates": rates}


def step_rates(args: argparse.Namespace) -> dict[str, float]:
    """Return MB/s of raw text of each step of the reading stage, in this process, on c4."""
    plain = [Piece(str(path), 0) for path in sorted((Text(args).folder / "c4").glob("*.jsonl"))]
    documents = [document for piece in plain for document in read_piece(piece, Reading())]
    size, texts = sum(len(document.raw) for document in documents), [document.text for document in documents]
    tokenizer, everything = load_tokenizer(args.tokenizer), CleanConfig(True, "en", 0.65, True, True)
    tokenizer.encode_packed([""])
    steps: dict[str, Callable[[], Any]] = {
        "parse": lambda: [sum(1 for _ in read_piece(piece, Reading())) for piece in plain],
        "encode, no word known": lambda: tokenizer.encode_packed(texts),
        "encode, all words known": lambda: tokenizer.encode_packed(texts),
        "MinHash": lambda: signatures(args.work / "step", texts),
    }
    rules = {"repair": {"repair": True}, "language": {"language": "en"}}
    rules |= {f"gopher {rule}": {f"gopher_{rule}": True} for rule in ("repetition", "quality")}
    for name, settings in rules.items():
        cleaner = Cleaner(CleanConfig(**settings))
        cleaner(texts[0])  # loads the model of languages
        steps[name] = lambda cleaner=cleaner: [cleaner(text) for text in texts]
    batches = [documents[first : first + 512] for first in range(0, len(documents), 512)]
    for name, clean in (("clean, encode (words known), hash", everything), ("encode, hash", CleanConfig())):
        encoder = Encoder(tokenizer, Cleaner(clean))
        steps[name] = lambda encoder=encoder: [encoder.encode(batch) for batch in batches]
    rates = {name: size / 1e6 / elapsed(step) for name, step in steps.items()}
    packed = read_piece(Piece(str(args.corpus / "c4.jsonl.xz"), 0), Reading())
    started = time.perf_counter()
    rates["decompress .xz, parse"] = sum(len(document.raw) for document in packed) / 1e6
    rates["decompress .xz, parse"] /= time.perf_counter() - started
    return rates


def elapsed(action: Callable[[], Any]) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def signatures(folder: Path, texts: list[str]) -> None:
    """Write the MinHash signatures of texts."""
    from datatrove.data import Document as Kept

    step = signature_step(fresh(folder))
    step.run((Kept(text=text, id="") for text in texts), 0, 1)


def part_reading(args: argparse.Namespace) -> dict[str, Any]:
    """Batches of a data set in the page cache, every sequence checked against its hash."""
    if not (args.work / "plain").exists():
        prepare_plain(args, Text(args))
    data, batch_size = Dataset(args.work / "plain"), 16
    for file in (data.path / "train").iterdir():
        file.read_bytes()
    touches = [elapsed(lambda row=row: data.read(np.array([row]))) for row in data._chunk_starts[:-1]]
    steps, started = itertools.cycle(range(data.size // batch_size)), time.perf_counter()
    tokens = 0
    while (seconds := time.perf_counter() - started) < 10:
        tokens += data.batch(data.prepared_seed, next(steps), batch_size).ids.size
    shuffled, started = 0, time.perf_counter()
    for step in range(min(500, data.size // batch_size)):
        shuffled += data.batch(data.prepared_seed + 1, step, batch_size).ids.size
    other = time.perf_counter() - started
    rows_a_chunk = data.size / len(touches)
    rows = [
        row("stored order, 16 × 2,049", tokens / seconds / 1e6, "M tokens/s", least=7),
        row("another seed's order, 16 × 2,049", shuffled / other / 1e6, "M tokens/s", least=7),
        row("first touch of a chunk", 1e3 * float(np.median(touches)), "ms"),
        row("first touch of a chunk, per sequence in it", 1e6 * float(np.median(touches)) / rows_a_chunk, "µs"),
    ]
    return {"rows": rows, "sequences_per_chunk": rows_a_chunk}


def part_disk(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes on disk for each stored token, and the arithmetic of the order at the size of the paper's corpus."""
    rows, folders = [], {}
    for name, make in (("plain", lambda: prepare_plain(args, Text(args))), ("cleaned", lambda: part_cleaning(args))):
        if not (args.work / name).exists():
            make()
        data = Dataset(args.work / name)
        tokens = SEQUENCE_LENGTH * (data.size + sum(entry["rows"] for entry in data.manifest["holdout"]))
        sizes: dict[str, int] = {}
        for path in data.path.rglob("*"):
            kind = "leaves" if path.name.endswith(".leaves.npy") else path.relative_to(data.path).parts[0]
            sizes[kind] = sizes.get(kind, 0) + (path.stat().st_size if path.is_file() else 0)
        folders[name] = {"tokens": tokens, "bytes": sizes}
        rows.append(row(f"{name} data set", sum(sizes.values()) / tokens, "bytes/token", most=2.1))
    total, sample, block = 600_000_000, 20_000_000, 1 << 20
    counts = [SourceCount(name, total // 7, total // 700, total // 7 - total // 700) for name in SOURCES]
    layout = Layout(bytes(32), 0, counts)

    def scaled(look_up: Callable[[np.ndarray], Any], size: int) -> float:
        starts = np.linspace(0, size - block, sample // block).astype(np.int64)
        return elapsed(lambda: [look_up(np.arange(s, s + block)) for s in starts]) * total / (len(starts) * block)

    origins, places = (
        scaled(layout.train_origin, layout.train_size),
        scaled(lambda part: layout.train_rows(0, part), total // 7),
    )
    rows.append(row("origins of 6×10⁸ rows (scaled from 2×10⁷)", origins, "s"))
    rows.append(row("rows of 6×10⁸ sequences (scaled from 2×10⁷)", places, "s"))
    return {"rows": rows, "data_sets": folders}


def part_memory(args: argparse.Namespace) -> dict[str, Any]:
    """The peak of the whole process tree for inputs of growing size, which must not grow with them."""
    clean = CleanConfig(repair=True, exact_duplicates=True)
    runs = [(size, clean) for size in args.gib]
    if args.near_gib:
        runs.append((args.near_gib, replace(clean, near_duplicates=True)))
    rows, found, sums = [], [], []
    for size, clean in runs:
        noisy, out = fresh(args.work / "noisy"), args.work / "memory"
        write_noisy(args, noisy, int(size * GIB))
        for path in (out, out.with_name("memory.partial")):
            shutil.rmtree(path, ignore_errors=True)
        arguments = plain_recipe(args, noisy, clean), out, no_progress, Execution(workers=args.processes)
        stages = watch_memory(out.with_name("memory.partial"), prepare, *arguments)
        peak = {kind: max(stage[kind] for stage in stages.values()) for kind in stages["other"]}
        found.append({"gib": size, "near_duplicates": clean.near_duplicates, "peak": peak, "stages": stages})
        label = f"{size:g} GiB" + (", near duplicates" if clean.near_duplicates else "")
        rows.append(row(f"{label}: all processes (PSS)", peak["pss"] / GIB, "GiB", most=2))
        rows.append(row(f"{label}: all processes, not mapped from files", peak["anonymous"] / GIB, "GiB"))
        rows.append(row(f"{label}: largest process (RSS)", peak["largest"] / GIB, "GiB"))
        if not clean.near_duplicates:
            sums.append(peak)
        shutil.rmtree(noisy)
        shutil.rmtree(out)
    growth = {kind: sums[-1][kind] / sums[0][kind] for kind in sums[0]}
    rows.append(row("growth of all processes (PSS)", growth["pss"], "×", most=1.1))
    rows.append(row("growth of what is not mapped from files", growth["anonymous"], "×", most=1.1))
    return {"rows": rows, "runs": found}


def write_noisy(args: argparse.Namespace, folder: Path, size: int) -> None:
    """Write the corpus again and again, a new word in every document, until it is ``size`` bytes, a file each time."""
    random.seed(0)
    whole = sum(len(document.raw) for source in SOURCES for document in corpus_documents(args.corpus, source))
    for source in SOURCES:
        (folder / source).mkdir()
        documents = list(corpus_documents(args.corpus, source))
        left = size * sum(len(document.raw) for document in documents) / whole
        for number in itertools.count():
            if left <= 0:
                break
            with open(folder / source / f"{number:03d}.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    text = document.text
                    place = text.find(" ", random.randrange(len(text) + 1)) + 1  # noqa: S311
                    text = f"{text[:place]}{random.getrandbits(40):x} {text[place:]}"
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    left -= len(document.raw)
                    if left <= 0:
                        break


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "encoders": part_encoders,
    "datatrove": lambda args: part_beside(args, "datatrove", datatrove_seconds, 1.3),
    "datasets": lambda args: part_beside(args, "datasets", datasets_seconds, 3),
    "cleaning": part_cleaning,
    "reading": part_reading,
    "disk": part_disk,
    "memory": part_memory,
}


def main() -> None:
    """Run one part here, or all but 'memory', each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus, results = Path("corpus"), ROOT / "benchmarks" / "results" / "data.json"
    parser.add_argument("--corpus", type=Path, default=corpus, help="folder of NAME.jsonl.xz (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=corpus / "llama.model", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("data/benchmark"), help="scratch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=results, help="the JSON file to add to (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="for each that is compared (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=64, help="text of each source (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help="run this part alone")
    parser.add_argument("--gib", type=float, nargs="+", default=[2, 4], help="memory: inputs (default: 2 4)")
    parser.add_argument("--near-gib", type=float, default=0, help="memory: one more with near duplicates (0: none)")
    args = parser.parse_args()
    args.corpus, args.tokenizer, args.work = (p.absolute() for p in (args.corpus, args.tokenizer, args.work))
    if not args.part:
        for part in PARTS:
            if part != "memory":
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)  # noqa: S603
        return
    started, load = time.perf_counter(), os.getloadavg()[0]
    result = PARTS[args.part](args)
    facts = {"processes": args.processes, "load_before": load, "part_seconds": time.perf_counter() - started}
    result = {"environment": environment(), **facts, **result}
    write_json(args.out, {**(read_json(args.out) if args.out.exists() else {}), args.part: result})
    show(args.part, result)


if __name__ == "__main__":
    main()
