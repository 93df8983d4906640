"""The native engine against its own bounds: bare products, decoding and prefill of models in one process that take turns.

    python benchmarks/kernels.py shared.gguf large-base.gguf --threads 2 [--rounds 9]

A round times, for each model in another order, the products of a decoded token and nothing else (no norms, no attention), in
turns with decoding from 64 tokens on: once each thread goes through its share of all products without ever waiting, once
they go in step, a product whole before one begins that needs it, which no decoder can do without. Then products part by
part, and for 8 and for 64 tokens at once; decoding of eight sequences together, and from 900 tokens on with keys and values
of 8 and of 16 bits; a prefill of 512. The bytes that a part touches over its time tell how far its kernel is from the speed
at which the same threads read the same weights in the same order and do nothing else, which is measured in each round too.
Put models that differ in sharing alone beside each other: the ratio of their bare products is what sharing can gain, the
ratio of decoding what it does gain. Before, each model is opened in a process of its own, which tells the memory that it
takes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mobillama.engine.gguf_model import GGUFModel, read_model
from mobillama.engine.native_engine import NativeBatchEngine
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.native.library import kernels
from mobillama.record.environment import environment
from mobillama.record.files import write_json

RESULTS = Path(__file__).parent / "results" / "kernels.json"
PARTS = ("attention", "network", "head")
DECODED, SLOTS, CONTEXT, FAR = 32, 8, 1024, 900


def touched(model: GGUFModel) -> dict[str, int]:
    """Return the bytes of weights of each part that a token is multiplied with, a shared weight counted at each use."""
    sizes = {name: tensor.nbytes for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    found = dict.fromkeys(PARTS, 0)
    found["head"] = sizes[HEAD if HEAD in sizes else EMBEDDING]
    for block, ffn in model.shape.layer_weights:
        for part, start in (("attention", f"model.layers.{block}."), ("network", f"model.ffns.{ffn}.")):
            found[part] += sum(size for name, size in sizes.items() if name.startswith(start))
    return found


def per_second(amount: float, work: Callable[[], object]) -> float:
    """Return how much of something a call does in a second."""
    start = time.perf_counter()
    work()
    return amount / (time.perf_counter() - start)


def per_second_in_turns(times: int, *works: Callable[[int], object]) -> list[float]:
    """Return how often a second each work was done whose speeds are divided by each other: four times it, four the next, …

    What slows a machine down for a while then slows all of them down.
    """
    seconds = np.zeros(len(works))
    for number in range(times):
        for place, work in enumerate(works):
            start = time.perf_counter()
            for again in range(4):
                work(4 * number + again)
            seconds[place] += time.perf_counter() - start
    return list(4 * times / seconds)


def turn_of(engine: NativeBatchEngine, halves: NativeBatchEngine, bytes_of: dict[str, int]) -> dict[str, float]:
    """Return tokens per second of each kind of work, and bytes per second of each part of a token's products."""
    found = {f"products of {n}": per_second(n, lambda n=n: engine.multiply_only(n)) for n in (SLOTS, 64)}
    for part, size in bytes_of.items():
        for name, tokens in (("bytes", 1), ("reading", 0)):
            found[f"{name} of {part}"] = per_second(
                10 * size, lambda p=part, n=tokens: [engine.multiply_only(n, [p]) for _ in range(10)]
            )
    found["reading"] = per_second(10, lambda: [engine.multiply_only(0) for _ in range(10)])
    prompt = list(range(3, FAR + 3))
    for slot in range(SLOTS):
        engine.truncate(slot, 0)
    found["prefill 512"] = per_second(512, lambda: engine.feed([(0, prompt[:512])]))
    engine.feed([(0, prompt[512:])])
    halves.truncate(0, 0)
    halves.feed([(0, prompt)])
    for name, its in (("far", engine), ("far, 16 bits", halves)):
        found[f"decode {name}"] = per_second(
            DECODED, lambda its=its: [its.feed([(0, [t + 3])]) for t in range(DECODED)]
        )
    engine.truncate(0, 64)
    found["products"], found["products in step"], found["decode"] = per_second_in_turns(
        DECODED // 4,
        lambda t: engine.multiply_only(1),
        lambda t: engine.multiply_only(1, in_step=True),
        lambda t: engine.feed([(0, [t + 3])]),
    )
    engine.truncate(0, 64)
    engine.feed([(slot, prompt[:64]) for slot in range(1, SLOTS)])
    found[f"decode {SLOTS}"] = per_second(
        SLOTS * DECODED, lambda: [engine.feed([(s, [t + 3]) for s in range(SLOTS)]) for t in range(DECODED)]
    )
    return found


def resident() -> int:
    """Return the bytes of memory that this process takes, pages of mapped files among them."""
    status = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"^Rss:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024


def speak_memory(path: Path, threads: int) -> None:
    """Print what a process takes more once it has opened a model, and once it has decoded with it."""
    kernels()
    before, start = resident(), time.perf_counter()
    engine = NativeBatchEngine.load(path, 1, threads)
    loaded, seconds = resident(), time.perf_counter() - start
    engine.feed([(0, list(range(3, 67)))])
    for token in range(8):
        engine.feed([(0, [token])])
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    facts = {"loaded": loaded - before, "decoded": resident() - before, "peak": peak - before}
    print(json.dumps({"load_seconds": seconds, "weights": engine.memory.weights, **facts}))


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", choices=kernels(), default=kernels()[0])
    parser.add_argument("--remark", default="", help="what readers must know, e.g. 'random weights'")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--speak-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.speak_memory:
        speak_memory(args.models[0], args.threads)
        return

    engines: dict[str, tuple[NativeBatchEngine, NativeBatchEngine, dict[str, int]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for path in args.models:
        command = [sys.executable, __file__, str(path), "--threads", str(args.threads), "--speak-memory"]
        memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        model = read_model(path)
        made = [
            NativeBatchEngine(model, slots, args.threads, args.kernels, cache=cache, context_length=CONTEXT)
            for slots, cache in ((SLOTS, ""), (1, "f16"))
        ]
        engines[path.name] = (made[0], made[1], touched(model))
        rows[path.name] = {"memory": memory, "bytes_touched": touched(model)}
        rows[path.name]["bytes_stored_read_per_token"] = made[0].memory.read_per_token
        networks = {ffn for _, ffn in model.shape.layer_weights}
        rows[path.name] |= {"layers": model.shape.num_hidden_layers, "networks": len(networks)}
        del model
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for turn in range(args.rounds + 1):
        names = list(engines)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            its = turn_of(*engines[name])
            if turn:  # the first one warms up
                for key, value in its.items():
                    figures[name].setdefault(key, []).append(value)

    for name, its in figures.items():
        medians = {key: statistics.median(values) for key, values in its.items()}
        rows[name] |= {
            "per_second": {key: {"median": medians[key], "all": values} for key, values in its.items()},
            "decode_of_products": statistics.median(np.divide(its["decode"], its["products"])),
            "decode_of_products_in_step": statistics.median(np.divide(its["decode"], its["products in step"])),
            f"decode_{SLOTS}_of_decode": statistics.median(np.divide(its[f"decode {SLOTS}"], its["decode"])),
        }
        print(f"{name}: ", ", ".join(f"{key} {value:,.1f}" for key, value in medians.items()))
        ratios = [
            rows[name][key] for key in ("decode_of_products", "decode_of_products_in_step", f"decode_{SLOTS}_of_decode")
        ]
        print(
            f"    decode / products {ratios[0]:.2f}, in step {ratios[1]:.2f}; decode of {SLOTS} / of one {ratios[2]:.2f}; "
            f"{rows[name]['memory']}"
        )
    facts = {"kernels": args.kernels, "threads": args.threads, "rounds": args.rounds, "remark": args.remark}
    write_json(args.results, {**facts, "models": rows, "environment": environment()})


if __name__ == "__main__":
    main()
