"""The data pipeline beside its peers: speed, memory and disk, in one run on one machine.

    python benchmarks/data.py --corpus corpus --tokenizer corpus/llama.model [--part NAME]

Each part runs in a process of its own, prints its rows, and is merged into benchmarks/results/data.json. All compared
parts read the same plain .jsonl files, cut from the corpus beforehand, so that nobody pays for .xz. The part 'memory'
takes long and runs only when it is named. The part 'datatrove' needs orjson (pip install orjson).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import data_support as support
import numpy as np
from datatrove.data import Document as Kept

from mobillama.config import load_recipe
from mobillama.console import table
from mobillama.data.dataset import PREPARATION_NAME, Dataset
from mobillama.data.documents import Piece, Reading, read_piece
from mobillama.data.layout import Layout, SourceCount
from mobillama.data.prepare.clean import Cleaner
from mobillama.data.prepare.duplicates import signature_step
from mobillama.data.prepare.pipeline import no_progress, prepare
from mobillama.data.prepare.read import Encoder
from mobillama.data.prepare.stages import Execution
from mobillama.data.tokenizer import id_type, load_tokenizer, save_tokenizer
from mobillama.recipe import CleanConfig, PrepareRecipe, SourceConfig
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.record.merkle import merkle_root

ROOT = Path(__file__).parents[1]
SEQUENCE_LENGTH, CHUNKS = 2049, 36
PAPER_SEQUENCES, PAPER_CHUNK, MEASURED_SEQUENCES = 600_000_000, 600_000_000 // 360, 20_000_000
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


def compared_text(args: argparse.Namespace) -> support.Text:
    """Return the text that all are given."""
    return support.Text(args.corpus, args.work / "text", args.megabytes, args.processes)


def plain_recipe(args: argparse.Namespace, folder: Path, clean: CleanConfig) -> PrepareRecipe:
    """Return the preparation of a folder that holds a folder of every source."""
    sources = {name: SourceConfig(str(folder / name), clean=clean) for name in support.SOURCES}
    return PrepareRecipe(sources, str(args.tokenizer), sequence_length=SEQUENCE_LENGTH, chunks=CHUNKS)


def remove(out: Path) -> None:
    """Remove a data set, finished or not."""
    for path in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)


def prepare_seconds(recipe: PrepareRecipe, out: Path, processes: int) -> tuple[float, int]:
    """Prepare anew in ``out``; return the seconds from the first byte read to a finished data set, and the tokens."""
    remove(out)
    started = time.perf_counter()
    manifest = prepare(recipe, out, execution=Execution(workers=processes))
    return time.perf_counter() - started, sum(source["tokens"] for source in manifest["sources"])


def prepare_plain(args: argparse.Namespace) -> tuple[float, int]:
    """Prepare the compared text without cleaning."""
    recipe = plain_recipe(args, compared_text(args).folder, CleanConfig())
    return prepare_seconds(recipe, args.work / "plain", args.processes)


def prepare_cleaned(args: argparse.Namespace) -> tuple[float, int]:
    """Prepare the compared text by the recipe for seven sources."""
    words = [f"--sources.{name}.path={compared_text(args).folder / name}" for name in support.SOURCES]
    path = ROOT / "recipes" / "corpus-local.yaml"
    recipe = load_recipe(PrepareRecipe, path, [*words, f"--tokenizer={args.tokenizer}"])
    return prepare_seconds(recipe, args.work / "cleaned", args.processes)


def stages_of(data: Path) -> dict[str, float]:
    """Return the seconds of each stage of a preparation."""
    return dict(read_json(data / PREPARATION_NAME)["seconds"])


def exported_tokenizer(args: argparse.Namespace) -> Path:
    """Return the tokenizer.json that is exported from the sentencepiece model."""
    folder: Path = args.work / "tokenizer"
    save_tokenizer(load_tokenizer(args.tokenizer), folder)
    return folder / "tokenizer.json"


def compare(
    args: argparse.Namespace, least: float, peers: dict[str, Callable[[], tuple[float, int]]]
) -> dict[str, Any]:
    """Measure our preparation and its peers in turn, the best of some times each; ours must be ``least`` × the best."""
    megabytes = compared_text(args).megabytes
    contenders = {"mobillama": lambda: prepare_plain(args), **peers}
    each: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, int] = {}
    for _ in range(args.repeats):
        for name, measure in contenders.items():
            seconds, tokens[name] = measure()
            each[name].append(seconds)
    best = {name: min(seconds) for name, seconds in each.items()}
    rows = [row(name, megabytes / seconds, "MB/s") for name, seconds in best.items()]
    fastest = min(peers, key=lambda name: best[name])
    rows.append(row(f"mobillama / {fastest}", best[fastest] / best["mobillama"], "×", least=least))
    rows += [row(f"tokens: {name}", tokens[name] / tokens["mobillama"], "of ours") for name in peers]
    stages = stages_of(args.work / "plain")
    return {"rows": rows, "megabytes": megabytes, "seconds": each, "tokens": tokens, "stages": stages}


def part_encoders(args: argparse.Namespace) -> dict[str, Any]:
    """Everything to a finished data set, beside the fastest exact encoders alone with the text in memory."""
    texts, description = compared_text(args).texts(), exported_tokenizer(args)
    peers = {
        "sentencepiece, encoding alone": lambda: support.sentencepiece_seconds(args.tokenizer, texts, args.processes),
        "tokenizers, encoding alone": lambda: support.tokenizers_seconds(description, texts, args.processes),
    }
    result = compare(args, 0.85, peers)
    sample = texts[:: max(1, len(texts) // 200)]
    ours, theirs = load_tokenizer(args.tokenizer), load_tokenizer(description)
    packed = [np.array(ids, id_type(ours.vocab_size)).tobytes() for ids in ours.encode(sample)]
    agree = ours.encode_packed(sample) == theirs.encode_packed(sample) == packed
    agree = agree and len(set(result["tokens"].values())) == 1
    result["rows"].append(row(f"same ids in {len(sample)} texts, same number in all", agree, "", least=1))
    return result


def part_datatrove(args: argparse.Namespace) -> dict[str, Any]:
    """Everything to a finished data set, beside datatrove's tokenizer and merger."""
    text, description = compared_text(args), exported_tokenizer(args)

    def peer() -> tuple[float, int]:
        return support.datatrove_seconds(text.folder, description, args.work / "datatrove", args.processes)

    return compare(args, 1.3, {"datatrove": peer})


def part_datasets(args: argparse.Namespace) -> dict[str, Any]:
    """Everything to a finished data set, beside load_dataset, map, map and save_to_disk."""
    text, description = compared_text(args), exported_tokenizer(args)

    def peer() -> tuple[float, int]:
        return support.datasets_seconds(text.folder, description, args.work / "datasets", args.processes)

    return compare(args, 3, {"datasets": peer})


def part_cleaning(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe for seven sources with cleaning and near duplicates: its stages, and each step of reading alone."""
    seconds, _ = prepare_cleaned(args)
    megabytes, stages, rates = compared_text(args).megabytes, stages_of(args.work / "cleaned"), step_rates(args)
    rows = [row("all of it", megabytes / seconds / args.processes, "MB/s per process")]
    rows += [row(f"share of '{name}'", spent / seconds, "") for name, spent in stages.items()]
    rows += [row(f"c4, one process: {name}", rate, "MB/s") for name, rate in rates.items()]
    return {"rows": rows, "megabytes": megabytes, "seconds": seconds, "stages": stages, "rates": rates}


def step_rates(args: argparse.Namespace) -> dict[str, float]:
    """Return MB/s of raw text of each step of the reading stage, in this process, on c4."""
    files = [Piece(str(path), 0) for path in sorted((compared_text(args).folder / "c4").glob("*.jsonl"))]
    documents = [document for file in files for document in read_piece(file, Reading())]
    texts, size = [document.text for document in documents], sum(len(document.raw) for document in documents)
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.encode_packed([""])
    everything = {"repair": True, "language": "en", "gopher_repetition": True, "gopher_quality": True}
    steps: dict[str, Callable[[], Any]] = {
        "parse": lambda: [sum(1 for _ in read_piece(file, Reading())) for file in files],
        "encode, no word known": lambda: tokenizer.encode_packed(texts),
        "encode, all words known": lambda: tokenizer.encode_packed(texts),
        "MinHash": lambda: signature_step(args.work / "step").run((Kept(text, "") for text in texts), 0, 1),
    }
    for name, value in everything.items():
        cleaner = Cleaner(CleanConfig(**{name: value}))
        cleaner(texts[0])  # loads the model of languages
        steps[name.replace("_", " ")] = lambda cleaner=cleaner: [cleaner(text) for text in texts]
    batches = [documents[first : first + 512] for first in range(0, len(documents), 512)]
    for name, clean in (("encode and record", CleanConfig()), ("clean, encode, record", CleanConfig(**everything))):
        encoder = Encoder(tokenizer, Cleaner(clean))  # all words are known
        steps[name] = lambda encoder=encoder: [encoder.encode(batch) for batch in batches]
    rates = {name: size / 1e6 / elapsed(step) for name, step in steps.items()}
    started = time.perf_counter()
    packed = sum(len(document.raw) for document in support.corpus_documents(args.corpus, "c4"))
    return {**rates, "decompress .xz and parse": packed / 1e6 / (time.perf_counter() - started)}


def elapsed(action: Callable[[], Any]) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def part_reading(args: argparse.Namespace) -> dict[str, Any]:
    """Batches of a data set in the page cache, every sequence checked against its hash."""
    if not (args.work / "plain").exists():
        prepare_plain(args)
    data, batch_size = Dataset(args.work / "plain"), 16
    for file in (data.path / "train").iterdir():
        file.read_bytes()
    sizes = np.array([chunk["rows"] for chunk in data.manifest["chunks"]])
    touches = [elapsed(lambda first=first: data.read(np.array([first]))) for first in np.cumsum(sizes) - sizes]

    def speed(seed: int) -> float:
        tokens, steps, started = 0, itertools.cycle(range(data.size // batch_size)), time.perf_counter()
        while (seconds := time.perf_counter() - started) < 5:
            tokens += data.batch(seed, next(steps), batch_size).ids.size
        return tokens / 1e6 / seconds

    leaves = np.zeros((PAPER_CHUNK, 32), np.uint8)
    checking = elapsed(lambda: merkle_root([leaf.tobytes() for leaf in leaves]))
    rows = [
        row("batches of 16 in the stored order", speed(data.prepared_seed), "M tokens/s", least=7),
        row("batches of 16 in another seed's order", speed(data.prepared_seed + 1), "M tokens/s", least=7),
        row(f"first touch of a chunk of {sizes[0]:,}", 1e3 * float(np.median(touches)), "ms"),
        row(f"leaves of a chunk of the paper's ({PAPER_CHUNK:,})", checking, "s"),
    ]
    return {"rows": rows}


def part_disk(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes on disk for each stored token, and the arithmetic of the order at the size of the paper's corpus."""
    rows, found = [], {}
    for name, make in (("plain", prepare_plain), ("cleaned", prepare_cleaned)):
        if not (args.work / name).exists():
            make(args)
        data, sizes = Dataset(args.work / name), Counter[str]()
        tokens = SEQUENCE_LENGTH * (data.size + sum(entry["rows"] for entry in data.manifest["holdout"]))
        for path in data.path.rglob("*"):
            kind = "leaves" if path.name.endswith(".leaves.npy") else path.relative_to(data.path).parts[0]
            sizes[kind] += path.stat().st_size if path.is_file() else 0
        found[name] = {"tokens": tokens, "bytes": dict(sizes)}
        rows.append(row(f"{name} data set", sizes.total() / tokens, "bytes/token", most=2.1))
    each, block = PAPER_SEQUENCES // len(support.SOURCES), 1 << 18
    counts = [SourceCount(name, each, each // 100, each - each // 100) for name in support.SOURCES]
    layout = Layout(bytes(32), 0, counts)
    arithmetic: tuple[tuple[str, Callable[[Any], Any], int], ...] = (
        ("origins of all rows", layout.train_origin, layout.train_size),
        ("rows of all sequences", lambda sequences: layout.train_rows(0, sequences), each),
    )
    for name, look_up, size in arithmetic:
        starts = np.linspace(0, size - block, MEASURED_SEQUENCES // block).astype(np.int64)
        seconds = elapsed(lambda look_up=look_up, starts=starts: [look_up(np.arange(s, s + block)) for s in starts])
        scale = PAPER_SEQUENCES / (len(starts) * block)
        rows.append(row(f"{name}, 6×10⁸ (scaled from 2×10⁷)", seconds * scale, "s"))
    return {"rows": rows, "data_sets": found}


def part_memory(args: argparse.Namespace) -> dict[str, Any]:
    """The peak of the whole process tree for inputs of growing size, which must not grow with them."""
    runs = [(size, CleanConfig(repair=True, exact_duplicates=True)) for size in args.gib]
    if args.near_gib:
        runs.append((args.near_gib, replace(runs[0][1], near_duplicates=True)))
    rows, found, sums = [], [], []
    for size, clean in runs:
        noisy, out = support.fresh(args.work / "noisy"), args.work / "memory"
        support.write_noisy(args.corpus, noisy, int(size * GIB))
        remove(out)
        recipe, execution = plain_recipe(args, noisy, clean), Execution(workers=args.processes)
        stages = support.watch_memory(out.with_name("memory.partial"), prepare, recipe, out, no_progress, execution)
        peak = {kind: max(stage[kind] for stage in stages.values()) for kind in stages["other"]}
        found.append({"gib": size, "near_duplicates": clean.near_duplicates, "peak": peak, "stages": stages})
        label = f"{size:g} GiB" + (", near duplicates" if clean.near_duplicates else "")
        rows.append(row(f"{label}: all processes (PSS)", peak["pss"] / GIB, "GiB", most=2))
        rows.append(row(f"{label}: all processes, not mapped from files", peak["anonymous"] / GIB, "GiB"))
        rows.append(row(f"{label}: largest process (RSS)", peak["largest"] / GIB, "GiB"))
        if not clean.near_duplicates:
            sums.append(peak)
        remove(out)
        shutil.rmtree(noisy)
    if len(sums) > 1:
        for kind, what in (("pss", "all processes (PSS)"), ("anonymous", "what is not mapped from files")):
            rows.append(row(f"growth of {what}", sums[-1][kind] / sums[0][kind], "×", most=1.1))
    return {"rows": rows, "runs": found}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "encoders": part_encoders,
    "datatrove": part_datatrove,
    "datasets": part_datasets,
    "cleaning": part_cleaning,
    "reading": part_reading,
    "disk": part_disk,
    "memory": part_memory,
}


def main() -> None:
    """Run one part here, or all but 'memory', each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus, results = Path("corpus"), Path(__file__).parent / "results" / "data.json"
    parser.add_argument("--corpus", type=Path, default=corpus, help="folder of NAME.jsonl.xz (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=corpus / "llama.model", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("data/benchmark"), help="scratch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=results, help="the JSON file to add to (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="for each that is compared (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=40, help="text of each source (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of each that is compared; the best counts (default: 2)")
    parser.add_argument("--part", choices=PARTS, help="run this part alone")
    parser.add_argument("--gib", type=float, nargs="+", default=[2, 4], help="memory: inputs (default: 2 4)")
    parser.add_argument("--near-gib", type=float, help="memory: one more input, with near duplicates")
    args = parser.parse_args()
    args.corpus, args.tokenizer = args.corpus.absolute(), args.tokenizer.absolute()
    if not args.part:
        for part in PARTS:
            if part != "memory":
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)
        return
    args.work = args.work.absolute() / f"{args.megabytes}-megabytes-{args.processes}-processes"
    started, load = time.perf_counter(), os.getloadavg()[0]
    result = PARTS[args.part](args)
    facts = {"processes": args.processes, "load_before": load, "part_seconds": time.perf_counter() - started}
    result = {"environment": environment(), **facts, **result}
    write_json(args.out, {**(read_json(args.out) if args.out.exists() else {}), args.part: result})
    show(args.part, result)


if __name__ == "__main__":
    main()
