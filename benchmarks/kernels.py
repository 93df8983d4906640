"""The native engine against its own bounds: bare products, decoding and prefill of models in one process that take turns.

    python benchmarks/kernels.py shared.gguf unshared.gguf --threads 2 [--rounds 9] [--out kernels.json]

A round times, for each model in another order: the products of a decoded token and nothing else (no norms, attention or
waiting for other threads), the same for 8 and for 64 tokens at once, decoding from 64 tokens on, and a prefill of 512. The
bytes that a token touches over its time tell how far the kernels are from the memory's speed, which is measured in each
round too. Put models that differ in sharing alone beside each other: the ratio of their bare products is what sharing can
gain, the ratio of decoding what it does gain.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mobillama.engine.gguf_model import GGUFModel, read_model
from mobillama.engine.native_engine import NativeEngine
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.native.library import kernels
from mobillama.record.environment import environment
from mobillama.record.files import write_json

DECODED = 48


def touched(model: GGUFModel) -> int:
    """Return the bytes of weights that a token is multiplied with, a shared weight counted at each use."""
    sizes = {name: tensor.nbytes for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    total = sizes[HEAD if HEAD in sizes else EMBEDDING]
    for block, ffn in model.shape.layer_weights:
        starts = (f"model.layers.{block}.", f"model.ffns.{ffn}.")
        total += sum(size for name, size in sizes.items() if name.startswith(starts))
    return total


def per_second(tokens: int, work: Callable[[], object]) -> float:
    """Return the tokens that a call makes in a second."""
    start = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - start)


def turn_of(engine: NativeEngine) -> dict[str, float]:
    """Return tokens per second of each kind of work."""
    found = {f"products of {n}": per_second(n, lambda n=n: engine.multiply_only(n)) for n in (8, 64)}
    found["products"] = per_second(10, lambda: [engine.multiply_only(1) for _ in range(10)])
    engine.truncate(0)
    found["prefill 512"] = per_second(512, lambda: engine.feed(list(range(3, 515))))
    engine.truncate(64)
    found["decode"] = per_second(DECODED, lambda: [engine.feed([token + 3]) for token in range(DECODED)])
    return found


def memory_speed(threads: int, arrays: list[np.ndarray]) -> float:
    """Return bytes per second read from memory by all threads together."""
    with ThreadPoolExecutor(threads) as pool:
        return per_second(sum(array.nbytes for array in arrays), lambda: list(pool.map(np.max, arrays)))


def main() -> None:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", choices=kernels(), default=kernels()[0])
    parser.add_argument("--remark", default="", help="what readers must know, e.g. 'random weights'")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    engines, bytes_touched, loading = {}, {}, {}
    for path in args.models:
        start = time.perf_counter()
        model = read_model(path)
        engines[path.name] = NativeEngine(model, args.threads, args.kernels)
        engines[path.name].feed([1])
        loading[path.name] = time.perf_counter() - start
        bytes_touched[path.name] = touched(model)
        del model
    arrays = [np.zeros(32 << 20, np.float32) for _ in range(args.threads)]
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    limits = []
    for turn in range(args.rounds + 1):
        limits.append(memory_speed(args.threads, arrays))
        names = list(engines)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            its = turn_of(engines[name])
            if turn:  # the first one warms up
                for key, value in its.items():
                    figures[name].setdefault(key, []).append(value)

    rows = {}
    print(
        f"{args.kernels}, {args.threads} threads; memory read at {max(limits) / 1e9:.1f} GB/s; tokens/s median (best)"
    )
    for name, its in figures.items():
        medians = {key: statistics.median(values) for key, values in its.items()}
        rows[name] = {
            "tokens_per_second": {key: {"median": medians[key], "all": values} for key, values in its.items()},
            "decode_of_products": statistics.median(np.divide(its["decode"], its["products"])),
            "bytes_touched_per_token": bytes_touched[name],
            "bytes_stored_read_per_token": engines[name].memory.read_per_token,
            "touched_bytes_per_second": medians["decode"] * bytes_touched[name],
            "load_and_first_token_seconds": loading[name],
        }
        print(f"{name}: ", ", ".join(f"{key} {medians[key]:.1f} ({max(values):.1f})" for key, values in its.items()))
        touched_mb, speed = bytes_touched[name] / 1e6, medians["decode"] * bytes_touched[name] / 1e9
        print(
            f"    decode / products {rows[name]['decode_of_products']:.2f}; {touched_mb:.0f} MB touched a token, "
            f"{speed:.1f} GB/s; load and first token {loading[name]:.2f} s"
        )
    if args.out:
        facts = {"kernels": args.kernels, "threads": args.threads, "rounds": args.rounds, "remark": args.remark}
        write_json(args.out, {**facts, "memory_bytes_per_second": limits, "models": rows, "environment": environment()})


if __name__ == "__main__":
    main()
