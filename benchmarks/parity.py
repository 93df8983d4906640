"""Exports to GGUF beside their models: our reader's numbers, and llama.cpp's, teacher-forced on real text.

    python benchmarks/parity.py runs/quickstart/export/mobillama SmolLM2-135M-Instruct.Q4_1.gguf --llama-python LLAMA/bin/python
    python benchmarks/parity.py --shapes runs/quickstart/export/mobillama --llama-python LLAMA/bin/python

For every type an unshared file is written and compared with the model in float32 through torch (what rounding costs) and
through stock llama.cpp (what is deployed), then llama.cpp with torch on the file's own numbers (what the engine adds).
llama-cpp-python has to be built for the machine, so it may live in an environment of its own: ``--llama-python`` names it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results" / "parity.json"
TYPES = ("f16", "q8_0", "q4_0", "q4_1")
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"share": "none"},
    {"share": "block"},
    {"ffn_groups": 2, "num_key_value_heads": 2},
    {"tie_word_embeddings": True},
    {"qk_norm": True},
    {"head_dim": 48},
    {"rope_theta": 5e5, "rms_norm_eps": 1e-3, "num_key_value_heads": 1},
    {"hidden_size": 212, "head_dim": 32, "intermediate_size": 200},
)
COLUMNS = ("torch", "llama_cpp", "llama_cpp_on_the_same_numbers")


def speak_llama(model: str, rows: Path) -> None:
    """Run in llama.cpp's environment: write each passage's ids and logits as float32, in order, to standard output."""
    import llama_cpp

    asked = json.loads(rows.read_text())
    longest, batch = max(map(len, asked["rows"])), asked["batch"]
    engine = llama_cpp.Llama(model, n_ctx=longest, n_batch=batch, n_ubatch=batch, logits_all=True, verbose=False)
    tokens = [engine.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]
    first = json.dumps({"llama_cpp": llama_cpp.__version__, "ids": tokens}).encode()
    sys.stdout.buffer.write(len(first).to_bytes(8, "little") + first)
    for ids in asked["rows"]:
        engine.reset()
        engine.eval(ids)
        sys.stdout.buffer.write(np.ascontiguousarray(engine.scores[: len(ids)], np.float32).data)


class Llama:
    """llama.cpp's answers to all passages, read as they come."""

    def __init__(
        self, python: str, model: Path, rows: list[list[int]], texts: list[str], vocabulary: int, batch: int = 512
    ) -> None:
        self._vocabulary = vocabulary
        asked = model.with_suffix(f".{batch}.json")
        asked.write_text(json.dumps({"rows": rows, "texts": texts, "batch": batch}))
        command = [python, __file__, "--speak-llama", str(model), str(asked)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.facts = json.loads(self._read(int.from_bytes(self._read(8), "little")))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of the next passage, which must be ``ids``."""
        return np.frombuffer(self._read(len(ids) * self._vocabulary * 4), np.float32).reshape(len(ids), -1)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        content = self._process.stdout.read(size)
        if len(content) < size:
            raise SystemExit("llama.cpp ended early; run --speak-llama by hand to see why")
        return content


def measure(source: Path, python: str, tokens: int, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of each type's file."""
    import torch

    from mobillama.deploy.gguf import export_gguf
    from mobillama.deploy.parity import Comparison, passages, texts, torch_logits
    from mobillama.deploy.source import Source
    from mobillama.engine import blocks
    from mobillama.engine.gguf_model import write_model
    from mobillama.engine.torch_gguf import encode_weights, load_gguf

    opened = Source.open(source)
    tokenizer = opened.tokenizer
    rows = passages(tokenizer, opened.shape.max_position_embeddings, tokens)
    asked = [row[:-1] for row in rows]
    plain = [text for text, _ in zip(texts(), range(200), strict=False)]
    expected = tokenizer.encode(plain)
    expected_logits = list(map(torch_logits(opened.model()), asked))
    for kind in TYPES:
        file = folder / f"{kind}.gguf"
        facts = export_gguf(source, file, blocks.TYPES[kind], shared=False, tokens=64)
        copy = torch_logits(load_gguf(file, torch.float32)[0])
        llama = Llama(python, file, asked, plain, opened.shape.vocab_size)
        found = {name: Comparison(tokenizer) for name in COLUMNS}
        for row, ours in zip(rows, expected_logits, strict=True):
            decoded, deployed = copy(row[:-1]), llama.logits(row[:-1])
            for name, pair in zip(COLUMNS, ((ours, decoded), (ours, deployed), (decoded, deployed)), strict=True):
                found[name].add(row, *pair)
        same = sum(a == b for a, b in zip(llama.facts["ids"], expected, strict=True))
        yield (
            kind,
            {
                "bytes": facts["bytes"],
                "head": facts["head"],
                "llama_cpp_python": llama.facts["llama_cpp"],
                "texts_with_the_same_ids": [same, len(plain)],
                **{name: comparison.result().record() for name, comparison in found.items()},
            },
        )
        if kind == "q4_0":  # what the head's eight bits are worth
            four = encode_weights(opened.weights, blocks.Q4_0, blocks.Q4_0)
            write_model(folder / "head.gguf", opened.shape, four, tokenizer, shared=False)
            copy, comparison = torch_logits(load_gguf(folder / "head.gguf", torch.float32)[0]), Comparison(tokenizer)
            for row, ours in zip(rows, expected_logits, strict=True):
                comparison.add(row, ours, copy(row[:-1]))
            size = (folder / "head.gguf").stat().st_size
            yield "q4_0, head too", {"bytes": size, "head": "Q4_0", COLUMNS[0]: comparison.result().record()}


def measure_shapes(tokenizer_of: Path, python: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield how llama.cpp agrees with torch on the same numbers of random models, one for each thing a shape may have."""
    import torch

    from mobillama.data.tokenizer import load_tokenizer
    from mobillama.deploy.gguf import export_gguf
    from mobillama.deploy.parity import compare, passages, torch_logits
    from mobillama.directory import save_model
    from mobillama.engine.blocks import TYPES
    from mobillama.engine.torch_gguf import load_gguf
    from mobillama.model.transformer import MobiLlama, initialise
    from mobillama.recipe import ModelConfig

    tokenizer = load_tokenizer(tokenizer_of)
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    rows = passages(tokenizer, 512, 500)
    for number, changes in enumerate(SHAPES):
        shape = ModelConfig(**{**sizes, "initializer_range": 0.06, **changes})
        model = MobiLlama(shape)
        initialise(model, shape, number)
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(weight, 1, 0.2, generator=torch.Generator().manual_seed(number))
        save_model(folder / f"model-{number}", shape, model.state_dict(), tokenizer)
        for kind in ("f32", "q4_0"):
            file = folder / f"{number}-{kind}.gguf"
            export_gguf(folder / f"model-{number}", file, TYPES[kind], shared=False, tokens=64)
            llama = Llama(python, file, [row[:-1] for row in rows], [], shape.vocab_size)
            copy = torch_logits(load_gguf(file, torch.float32)[0])
            name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "one shared network"
            yield f"{name}, {kind}", compare(copy, llama.logits, rows, tokenizer).record()


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="model directories and GGUF files")
    parser.add_argument(
        "--llama-python", default=sys.executable, help="Python of the environment with llama-cpp-python"
    )
    parser.add_argument("--shapes", type=Path, help="try every kind of shape, with the tokenizer of this directory")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--speak-llama", nargs=2, metavar=("MODEL", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.speak_llama:
        speak_llama(args.speak_llama[0], Path(args.speak_llama[1]))
        return
    from mobillama.console import note, table
    from mobillama.record.environment import environment
    from mobillama.record.files import read_json, write_json

    if args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            shapes = dict(measure_shapes(args.shapes, args.llama_python, Path(folder)))
        write_json(args.results.with_name("parity-shapes.json"), {"environment": environment(), "shapes": shapes})
        cells = [
            (name, f"{its['top1_agreement']:.1%}", f"{its['kl_nats_per_token']:.1e}") for name, its in shapes.items()
        ]
        table("llama.cpp beside torch on the same numbers, random weights", ["", "top-1", "KL"], cells)
    for source in args.models:
        rows = []
        found: dict[str, Any] = {"environment": environment(), "types": {}}
        with tempfile.TemporaryDirectory() as folder:
            for kind, result in measure(source, args.llama_python, args.tokens, Path(folder)):
                found["types"][kind] = result
                for engine in COLUMNS:
                    if engine in result:
                        its = result[engine]
                        cost = its["bits_per_byte_copy"] / its["bits_per_byte_model"] - 1
                        cells = f"{its['top1_agreement']:.2%}", f"{its['kl_nats_per_token']:.2e}", f"{cost:+.2%}"
                        rows.append((f"{kind} · {engine}", f"{result['bytes'] / 1e6:.1f}", *cells))
                known = read_json(args.results) if args.results.is_file() else {}
                write_json(args.results, {**known, _name(source): found})
                note(f"{source.name}: {kind} done")
        table(f"{_name(source)}, {args.tokens:,} tokens", ["", "MB", "top-1", "KL", "bits per byte"], rows)


def _name(source: Path) -> str:
    return source.stem if source.is_file() else "-".join(source.resolve().parts[-3:])


if __name__ == "__main__":
    main()
