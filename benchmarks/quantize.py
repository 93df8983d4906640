"""What few bits cost: a model in bf16, rounded to nearest, and calibrated in several ways, on text held out.

    python benchmarks/quantize.py RUN/checkpoints/step-…/model --data DATA --device cuda --suite-data BENCHMARKS

Calibrated rows are repeated with other draws of calibration text (``--seeds``), so that what a way gains can be told from luck.
Ways beside the one that ``mobillama compress quantize`` takes: the shared network calibrated on its use in one layer only
(first, middle, last), on none (the scales alone are chosen), and before attention instead of after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mobillama.compress.quantize import SEQUENCES, calibrated, judge, rounded
from mobillama.compress.texts import find_texts
from mobillama.console import note, progress, table
from mobillama.deploy.source import Source
from mobillama.engine.blocks import BF16, TYPES
from mobillama.engine.gguf_model import write_model
from mobillama.record.environment import environment
from mobillama.record.files import write_json
from mobillama.train.device import choose_device, describe_device

RESULTS = Path(__file__).parent / "results" / "quantize.json"
KINDS = ("q4_0", "q4_1", "q8_0")
PLAIN, CALIBRATED = "rounded to nearest", "calibrated on all uses"


def ways(source: Source, kind: str) -> dict[str, dict[str, Any]]:
    """Return the ways to calibrate, by name, as arguments of :func:`mobillama.compress.quantize.calibrated`."""
    found: dict[str, dict[str, Any]] = {CALIBRATED: {}}
    if kind == "q8_0" or source.shape.share == "none":
        return found
    last = source.shape.num_hidden_layers - 1
    for name, layer in (("first", 0), ("middle", last // 2), ("last", last)):
        found[f"network calibrated on its {name} use"] = {"uses": [layer]}
    return found | {"network not calibrated": {"uses": []}, "network before attention": {"network_first": True}}


def measure(
    source: Source, args: argparse.Namespace, folder: Path, show: Any
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield type, way and figures of each row; files of the first seed are left in ``folder``."""
    device, shape = choose_device(args.device), source.shape

    def texts(seed: int) -> Any:
        return find_texts(args.data, source.tokenizer, shape.max_position_embeddings, args.sequences, seed, args.tokens)

    def figures(kind: str, way: str, tensors: Any, seed: int) -> dict[str, Any]:
        file = folder / f"{kind} {way}.gguf"
        write_model(file, shape, tensors, source.tokenizer, shape.share != "none")
        held_out = {name: its.record() for name, its in judge(source, tensors, texts(seed), device, show).items()}
        return {"bytes": file.stat().st_size, "seed": seed, "held_out": held_out}

    yield "bf16", PLAIN, {"runs": [figures("bf16", PLAIN, rounded(source, BF16), 0)]}
    for kind in args.types:
        yield kind, PLAIN, {"runs": [figures(kind, PLAIN, rounded(source, TYPES[kind]), 0)]}
        for way, arguments in ways(source, kind).items():
            runs = []
            for seed in reversed(range(args.seeds)):
                start = time.perf_counter()
                tensors = calibrated(source, TYPES[kind], texts(seed), device, show, **arguments)
                seconds = time.perf_counter() - start
                runs.append({"seconds": seconds, **figures(kind, way, tensors, seed)})
            yield kind, way, {"runs": runs[::-1]}


def scores(models: dict[str, Path], data: Path, device: str, limit: int, folder: Path) -> dict[str, Any]:
    """Return each model's scores in suite quick."""
    words = ["--suite", "quick", "--benchmarks", data, "--device", device, "--out", folder / "evals", "--json"]
    words += ["--limit", limit] if limit else []
    command = [sys.executable, "-m", "mobillama", "evaluate", *models.values(), *words]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)
    results = json.loads(done.stdout)["results"]
    return {
        name: {"average": result["average"], "benchmarks": {k: v["score"] for k, v in result["benchmarks"].items()}}
        for name, result in zip(models, results, strict=True)
    }


def cost(run: dict[str, Any]) -> float:
    """Return what a run costs in bits per byte, as a share."""
    whole = run["held_out"]["all"]
    return float(whole["bits_per_byte_copy"] / whole["bits_per_byte_model"] - 1)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory or GGUF file")
    parser.add_argument(
        "--data", type=Path, help="prepared data to calibrate and judge on (default: the sample corpus)"
    )
    parser.add_argument("--types", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="to calibrate on")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration text")
    parser.add_argument("--tokens", type=int, default=100_000, help="to judge on")
    parser.add_argument("--suite-data", type=Path, help="local copies of the benchmarks: scores in suite quick too")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task of the suite")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    source = Source.open(args.model)
    # bf16 is what the model is compared with, whatever it was trained in.
    source = replace(source, weights={name: w.bfloat16() for name, w in source.weights.items()}, encoded=None)
    found: dict[str, Any] = {
        "environment": environment(),
        "model": source.name,
        "stored_parameters": sum(weight.numel() for weight in source.weights.values()),
        "shape": vars(source.shape),
        "device": describe_device(choose_device(args.device)),
        "threads": torch.get_num_threads(),
        "data": args.data.name if args.data else "the sample corpus",
        "sequences": args.sequences,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name, progress() as show:
        folder = Path(name)
        for kind, way, figures in measure(source, args, folder, show):
            found["rows"].append({"type": kind, "way": way, **figures})
            note(f"{kind}, {way}: {', '.join(f'{cost(run):+.3%}' for run in figures['runs'])}")
        write_json(args.results, found)  # whatever becomes of the suite
        if args.suite_data:
            models = {"bf16": args.model}
            models |= {
                f"{k} {way}": folder / f"{k} {way}.gguf" for k in ("q4_0", "q4_1") for way in (PLAIN, CALIBRATED)
            }
            models = {name: path for name, path in models.items() if path.exists()}
            found["quick"] = scores(models, args.suite_data, args.device, args.limit, folder)
            write_json(args.results, found)
    rows = []
    for row in found["rows"]:
        costs, whole = [cost(run) for run in row["runs"]], row["runs"][0]["held_out"]["all"]
        rows.append(
            (
                f"{row['type']} · {row['way']}",
                f"{row['runs'][0]['bytes'] / 1e6:.2f}",
                f"{statistics.mean(costs):+.3%}",
                f"{whole['kl_nats_per_token']:.2e}",
                f"{whole['top1_agreement']:.2%}",
            )
        )
    table(f"{source.name}, {whole['tokens']:,} tokens", ["", "MB", "bits per byte", "KL", "top-1"], rows)


if __name__ == "__main__":
    main()
