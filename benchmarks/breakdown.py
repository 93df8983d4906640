"""Where a training step's time goes on a GPU: kernels by kind, idle time, and what the bare products would take.

    python benchmarks/breakdown.py                          # mobillama-0.5b, fused, bfloat16
    python benchmarks/breakdown.py --float8 --preset mobillama-0.8b

The bare products are those of the step, of the same shapes and input types on random numbers, all written in bfloat16, one kind
after another with nothing between them: about the time that no other way of computing the rest can save.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from contenders import our_train_config
from torch.profiler import ProfilerActivity, profile

from mobillama.console import note, table
from mobillama.recipe import PRESETS, ModelConfig, OptimizerConfig, PretrainRecipe
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.train.arithmetic import Float8
from mobillama.train.step import Stepper
from mobillama.train.task import Pretraining
from mobillama.train.world import World
from train import RandomTokens

RESULTS = Path(__file__).parent / "results" / "breakdown.json"
KINDS = (
    ("attention", r"flash_attn|sdpa|fmha"),
    ("products", r"nvjet|gemm|Gemm|cutlass"),
    ("norms", r"_normalise"),
    ("rotation", r"_rotate"),
    ("SwiGLU", r"_swiglu|silu"),
    ("casts to float8", r"_quantise"),
    ("optimizer, clipping", r"multi_tensor"),
    ("loss", r"softmax"),
    ("other", r""),
)


def kernels_of(stepper: Stepper, warm_up: int, steps: int) -> tuple[dict[str, float], float, dict[str, float]]:
    """Return the milliseconds of a step's kernels by kind, those in which the GPU had nothing to do, and those of the kernels
    that take longest among "other".
    """
    for number in range(warm_up):
        stepper.update(3e-4, stepper.gradient(number))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for number in range(warm_up, warm_up + steps):
            stepper.update(3e-4, stepper.gradient(number))
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    found: Counter[str] = Counter()
    others: Counter[str] = Counter()
    idle, busy_until = 0.0, spans[0][0]
    for start, end, name in spans:
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name))
        found[kind] += end - start
        if kind == "other":
            others[name] += end - start
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    kinds = {kind: found[kind] / steps / 1e3 for kind, _ in KINDS if found[kind]}
    return kinds, idle / steps / 1e3, {name: time / steps / 1e3 for name, time in others.most_common(12)}


def bare_products(config: ModelConfig, tokens: int, float8: bool) -> float:
    """Return the milliseconds of all products of a step: output, input gradient and weight gradient of each matrix."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = (config.num_attention_heads + 2 * config.key_value_heads) * config.attention_head_dim
    seen = config.num_attention_heads * config.attention_head_dim
    inner = config.intermediate_size
    shapes = [(heads, width, layers), (width, seen, layers), (2 * inner, width, layers), (width, inner, layers)]
    total = sum(count * _three_products(tokens, o, i, float8) for o, i, count in shapes)
    return total + _three_products(tokens, config.vocab_size, width, False)


def _three_products(tokens: int, outputs: int, inputs: int, float8: bool) -> float:
    x_ni, grad_no, weight_oi = (
        torch.randn(shape, device="cuda").bfloat16()
        for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs))
    )
    if not float8:
        return sum(
            map(_milliseconds, (lambda: x_ni @ weight_oi.T, lambda: grad_no @ weight_oi, lambda: grad_no.T @ x_ni))
        )
    multiply = Float8()
    weight, grad, x = multiply.weight(weight_oi), multiply.gradient(grad_no), multiply.weight(x_ni)

    def product(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, fast: bool) -> Any:
        return lambda: torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)

    products = (
        product(x[0], x[2], weight[0], weight[2], True),
        product(grad[0], grad[2], weight[1], weight[2], False),
        product(grad[1], grad[2], x[1], x[2], False),
    )
    return sum(map(_milliseconds, products))


def _milliseconds(run: Any, times: int = 20) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mobillama-0.5b", help="(default: %(default)s)")
    parser.add_argument("--float8", action="store_true", help="multiply in float8")
    parser.add_argument("--compiled", action="store_true", help="the compiled step instead of the fused one")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    args.device, args.eager, args.warm_up, args.steps = "cuda", False, 4, 4
    config = PRESETS[args.preset][0]
    data: Any = RandomTokens(config.vocab_size, config.max_position_embeddings, 64)
    train = our_train_config(args, args.float8, not args.compiled)
    recipe = PretrainRecipe("", "", model=config, optimizer=OptimizerConfig(warmup_steps=0), train=train)
    stepper = Stepper(Pretraining(recipe, data), World(0, 1, 1, torch.device("cuda")))
    kinds, idle, others = kernels_of(stepper, args.warm_up, args.steps)
    del stepper
    bare = bare_products(config, args.micro_batch * config.max_position_embeddings, args.float8)
    way = ("compiled" if args.compiled else "fused") + (", float8" if args.float8 else "")
    result = {
        "environment": environment(),
        "device": torch.cuda.get_device_name(),
        "micro_batch": args.micro_batch,
        "milliseconds": {**kinds, "idle": idle},
        "largest_of_other_milliseconds": others,
        "bare_products_milliseconds": bare,
    }
    write_json(args.out, {**(read_json(args.out) if args.out.exists() else {}), f"{args.preset}, {way}": result})
    total = sum(kinds.values()) + idle
    rows = [(kind, f"{ms:.1f}", f"{ms / total:.1%}") for kind, ms in {**kinds, "idle": idle, "step": total}.items()]
    table(f"{args.preset}, {way}", ["", "ms a step", "share"], rows)
    for name, ms in others.items():
        note(f"  other: {ms:.2f} ms {name[:100]}")
    note(f"bare products of the same shapes: {bare:.1f} ms; those of the step: {kinds['products']:.1f} ms")


if __name__ == "__main__":
    main()
