"""The native engine beside llama.cpp and torch on one GGUF file and real text, teacher-forced.

    python benchmarks/native_parity.py SmolLM2-135M-Instruct.Q4_1.gguf texts.jsonl --llama-python LLAMA/bin/python

Told are: how often the likeliest token is the same; nats per token; and how far the logits of both are from those of the torch
model that holds the same decoded weights (relative error). The file has to be one that stock llama.cpp loads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from parity import Llama

from mobillama.engine import NATIVE, TORCH
from mobillama.engine.load import load_engine
from mobillama.record.environment import environment
from mobillama.record.files import write_json


def nats(logits_tv: NDArray[np.float32], ids: list[int]) -> float:
    """Return the sum of minus log probabilities of a passage's tokens but the first."""
    wide = logits_tv[:-1].astype(np.float64)
    most = wide.max(-1, keepdims=True)
    log_sums = np.log(np.exp(wide - most).sum(-1)) + most[:, 0]
    return float((log_sums - wide[np.arange(len(wide)), ids[1:]]).sum())


def main() -> None:
    """Compare, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help='lines {"text": …}')
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--passage", type=int, default=500, help="tokens of a text that are taken")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    native, tokenizer = load_engine(args.model, NATIVE)
    torch, _ = load_engine(args.model, TORCH, device="cpu")
    rows: list[list[int]] = []
    with open(args.texts, encoding="utf-8") as lines:
        for line in lines:
            (ids,) = tokenizer.encode([json.loads(line)["text"]])
            if len(ids) >= args.passage:
                rows.append([int(token) for token in ids[: args.passage]])
            if len(rows) * args.passage >= args.tokens:
                break
    if not rows:
        raise SystemExit(f"{args.texts}: no text has {args.passage} tokens")

    folder = tempfile.TemporaryDirectory()  # what is told to llama.cpp stands beside the file
    link = Path(folder.name) / args.model.name
    link.symlink_to(args.model.resolve())
    llama = Llama(args.llama_python, link, rows, [], native.vocab_size)
    same = dict.fromkeys(("native, llama.cpp", "native, torch", "llama.cpp, torch"), 0)
    lost = dict.fromkeys(("native", "llama.cpp", "torch"), 0.0)
    wrong: dict[str, list[float]] = {"native": [], "llama.cpp": []}
    for ids in rows:
        native.truncate(0)
        torch.truncate(0)
        logits = {"native": native.feed_each(ids), "llama.cpp": llama.logits(ids), "torch": torch.feed_each(ids)}
        for pair in same:
            first, second = (logits[name].argmax(-1) for name in pair.split(", "))
            same[pair] += int((first == second).sum())
        for name in lost:
            lost[name] += nats(logits[name], ids)
        for name, errors in wrong.items():
            errors.append(float(np.linalg.norm(logits[name] - logits["torch"]) / np.linalg.norm(logits["torch"])))

    count = len(rows) * args.passage
    found = {
        "model": args.model.name,
        "tokens": count,
        "same_likeliest_token": {pair: number / count for pair, number in same.items()},
        "nats_per_token": {name: total / (count - len(rows)) for name, total in lost.items()},
        "relative_error_to_torch": {name: float(np.mean(errors)) for name, errors in wrong.items()},
    }
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, found | {"llama_cpp": llama.facts["llama_cpp"], "environment": environment()})


if __name__ == "__main__":
    main()
