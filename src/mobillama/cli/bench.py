"""Verbs that measure: bench infer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mobillama.cli.verbs import add_group, add_verb, at_least, new_file
from mobillama.engine import ENGINES

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    group = add_group(verbs, "bench", "measure on this machine")
    verb = add_verb(group, "infer", _infer, "measure speed, memory and latency of models in engines that take turns")
    verb.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="GGUF files, model directories, and what 'export onnx' made",
    )
    verb.add_argument(
        "--engine",
        choices=("auto", *ENGINES, "llama.cpp"),
        default="auto",
        help="measure this one alone (default: each model in the engine that it was made for)",
    )
    verb.add_argument(
        "--threads",
        type=at_least(1),
        nargs="+",
        default=[],
        metavar="N",
        help="to measure at (default: 1, and all cores)",
    )
    verb.add_argument("--rounds", type=at_least(1), default=5, help="turns of each contender (default: %(default)s)")
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch (default: %(default)s)")
    verb.add_argument(
        "--context",
        type=at_least(1),
        default=0,
        help="tokens that engines have room for (default: what each model was made for; a graph's is fixed)",
    )
    verb.add_argument(
        "--llama-python",
        metavar="PYTHON",
        help="an interpreter with llama-cpp-python (default: this one, if it has it)",
    )
    verb.add_argument("--remark", default="", help="what readers must know, e.g. 'random weights'")
    verb.add_argument("--out", type=new_file, metavar="FILE.json", help="record the figures")
    verb.add_argument("--picture", type=new_file, metavar="FILE.png", help="draw them")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _infer(args: argparse.Namespace) -> None:
    from mobillama.workflows.inference import bench_inference

    bench_inference(
        args.models,
        args.engine,
        args.threads,
        args.rounds,
        args.device,
        args.context,
        args.llama_python,
        args.remark,
        args.out,
        args.picture,
        args.json,
    )
