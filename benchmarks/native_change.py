"""The native engine of this working tree beside that of an earlier commit: what a change gained, also on a busy machine.

    python benchmarks/native_change.py model.gguf --beside COMMIT [--launches 5] [--rounds 10]

Each launch starts both engines, each in a process of its own with the sources of its commit. They take turns, in another order
each round, and one sleeps while the other works. What a process is given of the machine's caches and memory differs from launch
to launch by several percent, so a ratio is told for each launch, and the median of the launches' medians with them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from mobillama.record.environment import available_cores, environment
from mobillama.record.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "native_change.json"
FAR, DECODED, SLOTS = 900, 12, 8


def work(path: Path, threads: int) -> None:
    """Be one of the engines: for each line of standard input do all kinds of work and print the tokens per second of each."""
    from mobillama.engine.gguf_model import read_model
    from mobillama.engine.native_engine import NativeBatchEngine

    engine = NativeBatchEngine(read_model(path), SLOTS, threads, context_length=1024)
    prompt = list(range(3, FAR + 3))
    engine.feed([(slot, prompt[:64]) for slot in range(1, SLOTS)])

    def speed(tokens: int, feeds: list[list[tuple[int, list[int]]]]) -> float:
        start = time.perf_counter()
        for feed in feeds:
            engine.feed(feed)
        return tokens / (time.perf_counter() - start)

    one = [[(0, [t + 3])] for t in range(DECODED)]
    eight = [[(slot, [t + 3]) for slot in range(SLOTS)] for t in range(DECODED)]
    print("ready", flush=True)
    for _ in sys.stdin:
        speeds: dict[str, float] = {}
        for slot in range(SLOTS):
            engine.truncate(slot, 0 if slot == 0 else 64)
        speeds["prefill 512"] = speed(512, [[(0, prompt[:512])]])
        engine.feed([(0, prompt[512:])])
        speeds[f"decode at {FAR}"] = speed(DECODED, one)
        engine.truncate(0, 64)
        speeds["decode at 64"] = speed(DECODED, one)
        speeds[f"decode {SLOTS}"] = speed(SLOTS * DECODED, eight)
        print(json.dumps(speeds), flush=True)


def started(sources: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    """Start an engine of these sources and wait until it is ready."""
    command = [sys.executable, __file__, str(args.model), "--threads", str(args.threads), "--work"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(sources)},
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{sources}: its engine did not start")
    return process


def asked(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let an engine work; return the tokens per second of each kind of work."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"an engine ended with exit code {process.wait()}; its message stands above")
    found: dict[str, float] = json.loads(answer)
    return found


def launch(sources: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return tokens per second of each engine, work and round."""
    processes = {name: started(path, args) for name, path in sources.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sources}
    for turn in range(args.rounds + 1):
        names = list(processes)
        for name in names if turn % 2 else reversed(names):
            its = asked(processes[name])
            for key, value in its.items() if turn else ():  # the first round warms up
                found[name].setdefault(key, []).append(value)
    for process in processes.values():
        process.communicate()
    return found


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--beside", help="the earlier commit")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--remark", default="", help="what readers must know, e.g. 'random weights'")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.model, args.threads)
        return
    if not args.beside:
        parser.error("--beside: name the commit that this working tree is compared with")

    found = subprocess.run(["git", "rev-parse", f"{args.beside}^{{commit}}"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        parser.error(f"--beside: git knows no commit '{args.beside}'; `git log` lists them")

    with tempfile.TemporaryDirectory() as earlier:
        archive = subprocess.run(["git", "archive", args.beside, "src"], cwd=ROOT, check=True, capture_output=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(earlier, filter="data")
        launches = [launch({"earlier": Path(earlier) / "src", "now": ROOT / "src"}, args) for _ in range(args.launches)]
    rows: dict[str, Any] = {}
    for kind in launches[0]["now"]:
        ratios = [
            statistics.median(
                now / earlier for now, earlier in zip(its["now"][kind], its["earlier"][kind], strict=True)
            )
            for its in launches
        ]
        speeds = {
            name: statistics.median(value for its in launches for value in its[name][kind]) for name in launches[0]
        }
        rows[kind] = {"per_second": speeds, "ratio": statistics.median(ratios), "ratio_of_launches": ratios}
        print(f"{kind}: {speeds['earlier']:.1f} -> {speeds['now']:.1f} tokens/s, {rows[kind]['ratio']:.3f}x", ratios)
    facts = {
        "model": args.model.name,
        "beside": found.stdout.strip(),
        "threads": args.threads,
        "rounds": args.rounds,
        "remark": args.remark,
    }
    write_json(args.results, {**facts, "work": rows, "environment": environment()})


if __name__ == "__main__":
    main()
