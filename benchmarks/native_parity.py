"""The native engine beside llama.cpp and torch on GGUF files and real text, teacher-forced.

    python benchmarks/native_parity.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2-q4_0.gguf --texts wikipedia.jsonl.xz \\
        --llama-python LLAMA/bin/python

Told are: bits per byte; how often the likeliest token is the same; and how far the logits are from those of the torch model
that holds the same decoded weights (relative error, mean of passages). ``f16 cache`` is the native engine with keys and values
of 16 bits, which tells what codes of 8 bits cost. ``llama.cpp, one by one`` is llama.cpp that takes the same tokens singly, as
in decoding, instead of 512 at once: how often it then says the same as before is what agreement with it can mean at most.
``sure``: of the tokens about which it agrees with itself. Files have to be ones that stock llama.cpp loads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from parity import Llama

from mobillama.console import note
from mobillama.data.tokenizer import Tokenizer, token_lengths
from mobillama.engine import NATIVE, TORCH
from mobillama.engine.gguf_model import read_model
from mobillama.engine.load import load_engine
from mobillama.engine.native_engine import NativeEngine
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "native-parity.json"
ONE_BY_ONE = "llama.cpp, one by one"


def nats(logits_tv: NDArray[np.float32], ids: list[int]) -> float:
    """Return the sum of minus log probabilities of a passage's tokens but the first."""
    wide = logits_tv[:-1].astype(np.float64)
    most = wide.max(-1, keepdims=True)
    log_sums = np.log(np.exp(wide - most).sum(-1)) + most[:, 0]
    return float((log_sums - wide[np.arange(len(wide)), ids[1:]]).sum())


def passages(texts: Path, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Yield the beginning of each text that is long enough."""
    reads = lzma.open if texts.suffix == ".xz" else open
    with reads(texts, "rt", encoding="utf-8") as lines:
        for line in lines:
            (ids,) = tokenizer.encode([json.loads(line)["text"]])
            if len(ids) >= length:
                yield [int(token) for token in ids[:length]]


def compare(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one file."""
    native, tokenizer = load_engine(model, NATIVE)
    engines = {
        "native": native,
        "f16 cache": NativeEngine(read_model(model), cache="f16"),
        "torch": load_engine(model, TORCH, device="cpu")[0],
    }
    rows = list(itertools.islice(passages(args.texts, tokenizer, args.passage), -(-args.tokens // args.passage)))
    if not rows:
        raise SystemExit(f"{args.texts}: no text has {args.passage} tokens")
    folder = tempfile.TemporaryDirectory()  # what is told to llama.cpp stands beside the file
    link = Path(folder.name) / model.name
    link.symlink_to(model.resolve())
    llamas = {
        name: Llama(args.llama_python, link, rows, [], native.vocab_size, batch)
        for name, batch in (("llama.cpp", 512), (ONE_BY_ONE, 1))
    }
    lost: dict[str, float] = {}
    same: dict[str, int] = {}
    sure: dict[str, int] = {}
    wrong: dict[str, list[float]] = {}
    for ids in rows:
        logits = {name: llama.logits(ids) for name, llama in llamas.items()}
        for name, engine in engines.items():
            engine.truncate(0)
            logits[name] = engine.feed_each(ids)
        for name, its in logits.items():
            lost[name] = lost.get(name, 0.0) + nats(its, ids)
            error = float(np.linalg.norm(its - logits["torch"]) / np.linalg.norm(logits["torch"]))
            wrong.setdefault(name, []).append(error)
        likeliest = {name: its.argmax(-1) for name, its in logits.items()}
        for pair in itertools.combinations(likeliest, 2):
            equal = likeliest[pair[0]] == likeliest[pair[1]]
            same[" = ".join(pair)] = same.get(" = ".join(pair), 0) + int(equal.sum())
        agreed = likeliest["llama.cpp"] == likeliest[ONE_BY_ONE]
        for name in ("native", "f16 cache", "torch"):
            equal = likeliest[name] == likeliest["llama.cpp"]
            sure[name] = sure.get(name, 0) + int((equal & agreed).sum())
    lengths = token_lengths(tokenizer)
    size = sum(int(lengths[token]) for ids in rows for token in ids[1:])
    count = len(rows) * args.passage
    return {
        "tokens": count,
        "passage": args.passage,
        "bits_per_byte": {name: total / math.log(2) / size for name, total in lost.items()},
        "same_likeliest_token": {pair: number / count for pair, number in same.items()},
        "same_where_sure": {name: number / same[f"llama.cpp = {ONE_BY_ONE}"] for name, number in sure.items()},
        "relative_error_to_torch": {name: float(np.mean(errors)) for name, errors in wrong.items() if name != "torch"},
        "llama_cpp_python": llamas["llama.cpp"].facts["llama_cpp"],
        "environment": environment(),
    }


def main() -> None:
    """Compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, required=True, help='lines {"text": …}, also compressed with xz')
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--passage", type=int, default=1000, help="tokens of a text that are taken")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for model in args.models:
        found = compare(model, args)
        note(f"{model.name}: {json.dumps(found, indent=2)}")
        known = read_json(args.results) if args.results.is_file() else {}
        write_json(args.results, {**known, model.stem: found})


if __name__ == "__main__":
    main()
