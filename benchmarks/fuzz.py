"""Files whose headers lie, by the hundred thousand: do our readers refuse them with an error of ours, at once and cheaply?

    python benchmarks/fuzz.py                      # 50,000 mutations for each of five readers; an hour on two cores
    python benchmarks/fuzz.py --count 2000
    MOBILLAMA_CACHE=/tmp/sanitized CXX='g++ -fsanitize=address,undefined -fno-sanitize-recover=all' \\
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \\
        python benchmarks/fuzz.py --readers 'native engine' --results fuzz-sanitized.json      # its C++ under sanitizers

Seeds are real small models as GGUF and as safetensors. Each mutation changes bytes, puts a striking number where a length may
stand, cuts, inserts or repeats a piece of the header, and for the native engine, which decodes from what it read, of the
weights too. A case counts as a failure if it ends in another error than ours, takes
longer than two seconds, or lets Python allocate more than twice the file and 64 KiB, or the process 256 MiB more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobillama.console import note, progress, table
from mobillama.errors import MobiLlamaError
from mobillama.record.environment import environment
from mobillama.record.files import write_json

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SECONDS, SLACK, PROCESS_SLACK = 2.0, 1 << 16, 256 << 20
STRIKING = [0, 1, 7, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62]
STRIKING += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1]


class Slow(Exception):
    """A reader took too long."""


def read_header(path: Path) -> None:
    """Read a GGUF file's header and every string and number in it."""
    from mobillama.engine.gguf import Strings, read_gguf

    file = read_gguf(path)
    for value in file.metadata.values():
        if isinstance(value, Strings):
            sum(map(len, value))
    sum(int(tensor.rows[0, 0]) for tensor in file.tensors.values())


def read_gguf_model(path: Path) -> None:
    """Read a GGUF file as a model: shape, tokenizer, tensors."""
    from mobillama.engine.gguf_model import read_model

    model = read_model(path)
    sum(int(tensor.rows[-1, -1]) for tensor in model.tensors.values())
    assert model.tokenizer is not None


def decode_natively(path: Path) -> None:
    """Decode from a GGUF file with the native engine: some tokens, a full context, and what is refused."""
    from mobillama.engine.gguf_model import read_model
    from mobillama.engine.native_engine import NativeBatchEngine

    model = read_model(path)
    engine = NativeBatchEngine(model, 2, threads=1)
    engine.feed([(1, [0, engine.vocab_size - 1]), (0, [1])])
    if engine.context_length <= 256:
        engine.feed([(1, [2] * (engine.context_length - 2))])
    for slot, ids in ((1, [0] * engine.context_length), (0, [engine.vocab_size]), (0, [-1]), (2, [1])):
        try:
            engine.feed([(slot, ids)])
        except ValueError:
            continue
        raise AssertionError("took in what it cannot")


def read_safetensors(path: Path) -> None:
    """Read a safetensors file as model directories are read."""
    from mobillama.directory import read_weights

    read_weights(path)


def read_foreign_safetensors(path: Path) -> None:
    """Read a safetensors file as imports read it."""
    from mobillama.importing.weight_files import WeightFiles

    files = WeightFiles(path.parent)
    for name in files:
        files[name]


READERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "GGUF header": (read_header, "gguf"),
    "GGUF model": (read_gguf_model, "gguf"),
    "native engine": (decode_natively, "gguf"),
    "safetensors": (read_safetensors, "safetensors"),
    "safetensors, import": (read_foreign_safetensors, "safetensors"),
}


def make_seeds(folder: Path) -> None:
    """Write small models: shared and not, with both types of tokenizers, in GGUF and safetensors."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from mobillama.data.tokenizer import load_tokenizer
    from mobillama.data.tokenizer_training import train_tokenizer
    from mobillama.deploy.parity import texts
    from mobillama.directory import save_tensors
    from mobillama.engine.blocks import TYPES
    from mobillama.engine.gguf_model import write_model
    from mobillama.engine.torch_gguf import encode_weights
    from mobillama.model.transformer import MobiLlama, initialise
    from mobillama.recipe import ModelConfig

    words = [text for text, _ in zip(texts(), range(40), strict=False)]
    train_tokenizer(words, 400, folder / "llama.model")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    backend.save(str(folder / "tokenizer.json"))
    for number, share in enumerate(("ffn", "none", "block")):
        shape = ModelConfig(400, 64, 96, 3, 4, share=share, max_position_embeddings=64)
        model = MobiLlama(shape)
        initialise(model, shape, number)
        weights = model.state_dict()
        tokenizer = load_tokenizer(folder / ("tokenizer.json" if share == "none" else "llama.model"))
        tensors = encode_weights(weights, TYPES[("q4_0", "f16", "q8_0")[number]], TYPES["q8_0"])
        write_model(folder / f"{share}.gguf", shape, tensors, tokenizer, share == "ffn")
        save_tensors(folder / f"{share}.safetensors", {name: w.to(torch.bfloat16) for name, w in weights.items()})


def header_size(content: bytes, form: str) -> int:
    """Return the bytes of a seed's header, where mutations happen."""
    if form == "safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return content.index(b"output.weight") + 64


def mutate(content: bytes, head: int, draw: random.Random) -> bytes:
    """Return a seed with one to four changes in its header."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        place, kind = draw.randrange(max(1, min(head, len(raw)))), draw.randrange(12)
        if kind <= 4 and raw:
            raw[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind <= 8:
            width = draw.choice((4, 8))
            value = draw.choice([*STRIKING, len(raw), len(raw) - place, draw.getrandbits(64)]) % (1 << (8 * width))
            raw[place : place + width] = value.to_bytes(width, "little")
        elif kind == 9:
            del raw[place : place + draw.randint(1, 16)]
        elif kind == 10:
            start = draw.randrange(max(1, min(head, len(raw))))
            raw[place:place] = raw[start : start + draw.randint(1, 64)]
        else:
            del raw[draw.choice((place, len(raw) - draw.randint(0, 64))) :]
    return bytes(raw)


def _too_slow(*unused: object) -> None:
    raise Slow


def run(task: tuple[str, str, int, int]) -> dict[str, Any]:
    """Read ``count`` mutations drawn from ``seed`` in a process of its own."""
    reader_name, folder, seed, count = task
    read, form = READERS[reader_name]
    draw = random.Random(seed)
    seeds = [
        (content := path.read_bytes(), len(content) if reader_name == "native engine" else header_size(content, form))
        for path in sorted(Path(folder).glob(f"*.{form}"))
    ]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest, most = 0.0, 0
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / ("model.safetensors" if form == "safetensors" else "model.gguf")
        for content, _ in seeds:  # what is imported on first use is no allocation of a reader's
            path.write_bytes(content)
            read(path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if "LD_PRELOAD" not in os.environ:  # AddressSanitizer reserves terabytes of addresses
            slack = (
                4 * PROCESS_SLACK if reader_name == "native engine" else PROCESS_SLACK
            )  # it reserves more than it takes
            resource.setrlimit(resource.RLIMIT_AS, (used + slack, used + slack))
        tracemalloc.start()
        for _ in range(count):
            content, head = draw.choice(seeds)
            mutated = mutate(content, head, draw)
            path.write_bytes(mutated)
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read(path)
                outcome = "read"
            except MobiLlamaError as error:
                outcome = type(error).__name__
            except BaseException as error:
                outcome = "failure"
                failures.append(f"{type(error).__name__}: {error}: {traceback.format_exc().splitlines()[-3].strip()}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - started)
            peak = tracemalloc.get_traced_memory()[1] - before
            most = max(most, peak)
            if peak > 2 * len(mutated) + SLACK:
                outcome = "failure"
                failures.append(f"allocated {peak:,} bytes for a file of {len(mutated):,}")
            outcomes[outcome] += 1
    return {"outcomes": outcomes, "failures": failures[:10], "slowest_seconds": slowest, "most_bytes": most}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="mutations for each reader")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[str, Any] = {"environment": environment(), "seed": args.seed, "seed_files": {}, "readers": {}}
    part = min(args.count, 2500)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, progress() as show:
        make_seeds(Path(folder))
        found["seed_files"] = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        for reader in args.readers:
            tasks = [(reader, folder, args.seed + number, part) for number in range(args.count // part)]
            total: dict[str, Any] = {
                "outcomes": Counter(),
                "failures": [],
                "slowest_seconds": 0.0,
                "most_bytes": 0,
            }
            with context.Pool(args.processes, maxtasksperchild=1) as pool:
                for done, result in enumerate(pool.imap_unordered(run, tasks, chunksize=1), 1):
                    total["outcomes"] += result["outcomes"]
                    total["failures"] += result["failures"]
                    for name in ("slowest_seconds", "most_bytes"):
                        total[name] = round(max(total[name], result[name]), 3)
                    show(reader, done * part, args.count)
            found["readers"][reader] = {"mutations": sum(total["outcomes"].values()), **total}
            write_json(args.results, found)
    rows = []
    for name, facts in found["readers"].items():
        counts = facts["outcomes"]
        failed, unchanged = counts.get("failure", 0), counts.get("read", 0)
        refused = facts["mutations"] - failed - unchanged
        numbers = facts["mutations"], refused, unchanged, failed
        peak = f"{facts['most_bytes'] / 2**10:.0f} KiB"
        rows.append((name, *(f"{number:,}" for number in numbers), f"{facts['slowest_seconds']:.2f} s", peak))
        for line in facts["failures"]:
            note(f"{name}: {line}")
    table("Mutated headers", ["reader", "tried", "refused", "read", "failures", "slowest", "allocated at most"], rows)


if __name__ == "__main__":
    main()
