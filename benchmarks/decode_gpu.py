"""Decoding on one GPU at batch 1 in bfloat16: our torch engine beside transformers' generate; weights are random.

    python benchmarks/decode_gpu.py                       # mobillama-0.5b: every contender
    python benchmarks/decode_gpu.py --preset large-base-1.2b --contenders "ours" "transformers"
    python benchmarks/decode_gpu.py --device cpu --preset mobillama-tiny --tokens 20 --contenders ours transformers

Each contender runs in a process of its own: greedy, no end mark, after a prompt of 64 tokens. Tokens/s are those of the
tokens after the first. transformers runs the unshared twin, a stock Llama of the same computation: as it is, with its static
cache, and with its static cache compiled, its fastest. GB/s read counts each distinct weight once a token, GB/s multiplied
each weight as often as a token is multiplied with it: a GPU whose cache is smaller than the shared network reads the latter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from apart import measure_apart
from torch import Tensor, nn
from torch.nn import functional as F

from mobillama.console import table
from mobillama.engine.torch_engine import TorchEngine
from mobillama.model.cost import model_cost
from mobillama.model.swiglu import swiglu
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PRESETS, ModelConfig
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "decode-gpu.json"
PROMPT = 64
Generate = Callable[[int], None]
"""Decodes so many tokens after the prompt."""


def our_model(config: ModelConfig, device: str) -> MobiLlama:
    """The model with random weights in bfloat16."""
    model = MobiLlama(config)
    initialise(model, config, 0)
    return model.to(device, torch.bfloat16).eval()


def ours(config: ModelConfig, args: argparse.Namespace, compile: bool = False, int8: bool = False) -> Generate:
    """Our engine, each token chosen on the host from its logits, as ``generate`` does."""
    model = our_model(config, args.device)
    if int8:
        quantize_to_int8(model)
    engine = TorchEngine(model, compile=compile)

    def generate(tokens: int) -> None:
        engine.truncate(0)
        token = int(engine.feed(range(3, 3 + PROMPT)).argmax())
        for _ in range(tokens - 1):
            token = int(engine.feed([token]).argmax())

    return generate


class Int8Linear(nn.Linear):
    """Our Linear as torchao takes it: one product that it knows."""

    def forward(self, x: Tensor, gated: bool = False) -> Tensor:
        """Multiply; with ``gated``, after swiglu."""
        return F.linear(swiglu(x) if gated else x, self.weight)


def quantize_to_int8(model: MobiLlama) -> None:
    """Let all products read int8 weights (torchao, a scale for each row)."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                plain = Int8Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = child.weight
                setattr(module, name, plain)
    quantize_(model, Int8WeightOnlyConfig())


def transformers(config: ModelConfig, args: argparse.Namespace, **options: Any) -> Generate:
    """generate of stock Llama, which stores the shared network once per layer."""
    from mobillama.hf.unshare import unshare

    model = our_model(config, "cpu")
    twin = unshare(model.state_dict(), config).to(args.device)
    prompt = torch.arange(3, 3 + PROMPT, device=args.device)[None]
    twin.generation_config.eos_token_id = None

    def generate(tokens: int) -> None:
        twin.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)

    return generate


CONTENDERS: dict[str, Callable[[ModelConfig, argparse.Namespace], Generate]] = {
    "ours": ours,
    "ours, compiled": lambda config, args: ours(config, args, compile=True),
    "ours, int8 weights, compiled": lambda config, args: ours(config, args, compile=True, int8=True),
    "transformers": transformers,
    "transformers, static cache": lambda config, args: transformers(
        config, args, cache_implementation="static", disable_compile=True
    ),
    "transformers, static cache, compiled": lambda config, args: transformers(
        config, args, cache_implementation="static"
    ),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of one contender, in this process."""
    config = dataclasses.replace(PRESETS[args.preset][0], max_position_embeddings=args.context)
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    cuda = args.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    started = time.perf_counter()
    generate = CONTENDERS[args.one](config, args)
    generate(args.tokens)
    synchronize()
    first = time.perf_counter() - started

    def seconds(tokens: int) -> float:
        before = time.perf_counter()
        generate(tokens)
        synchronize()
        return time.perf_counter() - before

    generate(args.tokens)
    speeds = [(args.tokens - 1) / (seconds(args.tokens) - seconds(1)) for _ in range(args.rounds)]
    cost, speed = model_cost(config), statistics.median(speeds)
    bytes_each = 1 if "int8" in args.one else 2
    shared = args.one.startswith("ours")
    return {
        "tokens_per_second": speed,
        "best": max(speeds),
        "milliseconds_to_first_token": 1e3 * statistics.median(seconds(1) for _ in range(args.rounds)),
        "gb_per_second_read": speed * (cost.matmul_stored if shared else cost.matmul_parameters) * bytes_each / 1e9,
        "gb_per_second_multiplied": speed * cost.matmul_parameters * bytes_each / 1e9,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "seconds_to_ready": first,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def show(title: str, found: dict[str, Any]) -> None:
    """Print a comparison."""
    rows = []
    for name, facts in found.items():
        if "error" in facts:
            rows.append((name, "failed", *facts["error"], *[""] * 4))
            continue
        ratio = facts["tokens_per_second"] / found.get("transformers", facts).get("tokens_per_second", float("nan"))
        numbers = (facts["gb_per_second_read"], facts["gb_per_second_multiplied"], facts["peak_gib"] or 0)
        rows.append(
            (
                name,
                f"{facts['tokens_per_second']:.1f} / {facts['best']:.1f}",
                f"{ratio:.2f} ×",
                *(f"{number:,.1f}" for number in numbers),
                f"{facts['milliseconds_to_first_token']:.1f}",
            )
        )
    columns = ["contender", "tokens/s median / best", "of transformers", "GB/s read", "GB/s multiplied", "peak GiB"]
    table(title, [*columns, "first token ms"], rows)


def _without_out(words: list[str]) -> list[str]:
    """Leave out where the result goes: a place on one machine."""
    place = words.index("--out") if "--out" in words else len(words)
    return words[:place] + words[place + 2 :]


def main() -> None:
    """Compare, or measure one contender here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mobillama-0.5b", help="(default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", default=list(CONTENDERS))
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that fit the cache (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the model: few are compiled soon (default: the preset's)")
    parser.add_argument("--tokens", type=int, default=256, help="decoded tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements, the median counts (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=240, help="seconds for a contender (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to (default: %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    name = f"{args.preset}, {args.layers} layers" if args.layers else args.preset
    machine = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    key, results = f"{name}, {machine}", read_json(args.out) if args.out.exists() else {}
    if lost := set(results.get(key, {}).get("contenders", {})).difference(args.contenders):
        parser.error(f"--contenders: the record has {', '.join(lost)} besides; measure all, or give --out another file")
    found: dict[str, Any] = {}
    for contender in args.contenders:
        found[contender] = measure_apart(args.preset, contender, args.limit)
    show(f"{name}, batch 1, bfloat16, random weights: {args.tokens} tokens after {PROMPT}", found)
    results[key] = {
        "environment": environment(),
        "command": shlex.join(["benchmarks/decode_gpu.py", *_without_out(sys.argv[1:])]),
        "weights": "random",
        "tokens": args.tokens,
        "contenders": found,
    }
    write_json(args.out, results)


if __name__ == "__main__":
    main()
