"""Every export of one model: what the automatic check says of it, and what each engine answers from it.

    python benchmarks/exports.py SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/exports.py MODEL --question "What is rain?"
    python benchmarks/exports.py MODEL --forms executorch --results benchmarks/results/exports-executorch.json

Exports are made by ``mobillama export`` in processes of their own, as a user makes them, and removed again; answers are the
likeliest tokens, from ``mobillama chat``. ExecuTorch, large and slow to lower, is asked for by name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mobillama.console import note, table
from mobillama.deploy.gguf import record_of
from mobillama.deploy.hf import PARITY_FILE
from mobillama.deploy.onnx import RECORD_FILE
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "exports.json"
FORMS: dict[str, tuple[list[str], list[str]]] = {
    "hf": (["hf"], ["torch"]),
    "hf --unshared": (["hf", "--unshared"], []),
    "gguf --type f16 --unshared": (["gguf", "--type", "f16", "--unshared"], ["native"]),
    "gguf --type q8_0": (["gguf", "--type", "q8_0"], ["native"]),
    "gguf --type q4_1": (["gguf", "--type", "q4_1"], ["native", "torch"]),
    "gguf --type q4_0": (["gguf", "--type", "q4_0"], ["native"]),
    "onnx": (["onnx"], ["onnxruntime"]),
    "onnx --activations float32 --cache float32": (
        ["onnx", "--activations", "float32", "--cache", "float32"],
        ["onnxruntime"],
    ),
    "executorch": (["executorch"], []),
}
"""Each form as it is called, as arguments, and the engines that run it."""
FIGURES = ("bytes", "parity", "parity_on_the_same_numbers", "rounding_of_activations_in_torch")
USUAL = [form for form in FORMS if form != "executorch"]


def export(model: Path, arguments: list[str], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Export a model; return where it lies and what was recorded of it."""
    kind, *flags = arguments
    out = folder / {"gguf": "model.gguf", "executorch": "model.pte"}.get(kind, "model")
    subprocess.run([sys.executable, "-m", "mobillama", "export", kind, model, out, *flags], check=True)
    return out, read_json({"hf": out / PARITY_FILE, "onnx": out / RECORD_FILE}.get(kind, record_of(out)))


def answer(model: Path, engine: str, question: str, tokens: int) -> str:
    """Return what an engine answers."""
    words = ["chat", model, "--engine", engine, "--temperature", "0", "--max-tokens", str(tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "mobillama", *words], input=question + "\n", capture_output=True, text=True, check=True
    )
    return done.stdout.split("> ", 1)[1].split("\n")[0].strip()


def main() -> None:
    """Export, ask, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory or a GGUF file")
    parser.add_argument("--question", default="What is a glacier?", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=USUAL, help="(default: all but executorch)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.forms != USUAL and args.results == RESULTS:
        parser.error("--forms: the record is of all usual forms; give --results another file")
    rows = []
    for form in args.forms:
        arguments, engines = FORMS[form]
        with tempfile.TemporaryDirectory() as folder:
            out, record = export(args.model, arguments, Path(folder))
            answers = {engine: answer(out, engine, args.question, args.tokens) for engine in engines}
        figures = {name: record[name] for name in FIGURES if name in record}
        rows.append({"form": form, **figures, "answers": answers})
        note(f"{form}: {answers}")
    facts = {"environment": environment(), "model": args.model.name, "question": args.question}
    write_json(args.results, {**facts, "rows": rows})
    table(
        args.model.name,
        ["export", "MB", "KL, nats/token", "same likeliest token"],
        [
            (
                row["form"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['parity']['kl_nats_per_token']:.1e}",
                f"{row['parity']['top1_agreement']:.2%}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
