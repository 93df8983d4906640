"""Speed and memory of a training step: ours, a plain reference, and peers, one after another in one go.

    python benchmarks/train.py                                   # one GPU: every contender on mobillama-0.5b
    python benchmarks/train.py --preset baseline2 --contenders ours plain
    python benchmarks/train.py --device cpu --preset mobillama-tiny --micro-batch 8
    python benchmarks/train.py --data DIR --steps 240 --contenders ours "ours, whole run"   # what records and checkpoints cost

Each contender runs in a process of its own on the same shape, batch and kind of tokens; what counts is the ratio, since
the next machine is another one. The plain reference (benchmarks/plain.py) is compiled as a whole and layer by layer, and
the faster of the two is what ours is compared with. A step is forward, backward, clipping and AdamW; a whole run reads its
data from disk, keeps all records and saves a checkpoint every 200 steps.

"ours" is fused on a Hopper GPU (train.fused), elsewhere it is the compiled one. Peers that cannot share layers' weights
compute the same with weights of their own, on half the micro-batch where the whole would not fit 80 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from apart import measure_apart
from contenders import CONTENDERS, PEERS, our_train_config

from mobillama.console import table
from mobillama.data.dataset import Batch, Dataset
from mobillama.model.cost import model_cost
from mobillama.recipe import PRESETS, ModelConfig, OptimizerConfig, PretrainRecipe
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.train.loop import Silent, pretrain

RESULTS = Path(__file__).parent / "results" / "train.json"
BF16_PEAK = 989e12  # an H100's, dense; model FLOPs utilisation (MFU) is stated as a share of it
WHOLE_RUN, REPEATABLE = "ours, whole run", "ours, deterministic"
DEFAULTS = {
    "cpu": ["ours", "plain", "plain, by layer", *(name for name in PEERS if name != "litgpt")],
    "cuda": [name for name in CONTENDERS if not name.startswith("Trainer")],
}
RIVALS = {"ours": ("plain", "plain, by layer"), "ours, float8": ("plain, float8", "plain, float8, by layer")}
BLOCKS = 3


class RandomTokens:
    """Stands for a data set: ids without meaning, the same for every contender."""

    source_names = ("random",)

    def __init__(self, vocabulary: int, context: int, rows: int) -> None:
        self.sequence_length = context + 1
        self.token_lengths = np.ones(vocabulary, np.int64)
        self._ids = np.random.default_rng(0).integers(0, vocabulary, (rows, context + 1))

    def batch(self, seed: int, step: int, batch_size: int, part: slice) -> Batch:
        """Return a part of a step's batch."""
        rows = np.arange(step * batch_size, (step + 1) * batch_size)[part] % len(self._ids)
        return Batch(self._ids[rows], rows, np.zeros(len(rows), np.int64))

    def learned_tokens(self, seed: int, step: int, batch_size: int) -> int:
        """Return how many tokens a step learns from."""
        return batch_size * (self.sequence_length - 1)


class Clock(Silent):
    """Notes when each step of a run was recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_record(self, record: dict[str, Any]) -> None:
        """Note the time."""
        if record["kind"] == "step":
            self.times.append(time.perf_counter())


def whole_run(config: ModelConfig, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of 200 steps of a run, a checkpoint's copy and its writing among them, and those of one step."""
    if not args.data:
        raise SystemExit("a whole run reads prepared data: --data DIR")
    with tempfile.TemporaryDirectory() as directory:
        train = dataclasses.replace(our_train_config(args, False, True), steps=262)
        optimizer = OptimizerConfig(warmup_steps=0)
        clock = Clock()
        pretrain(PretrainRecipe(str(args.data), f"{directory}/run", 0, config, optimizer, train), clock)
    steps = np.diff(clock.times)
    return clock.times[259] - clock.times[59], float(np.median(steps))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of one contender, in this process."""
    config = PRESETS[args.preset][0]
    context = min(args.context or config.max_position_embeddings, config.max_position_embeddings)
    data: Any = RandomTokens(config.vocab_size, context, 64)
    if args.data:
        data = Dataset(args.data)
        context = data.sequence_length - 1
        longest = max(context, config.max_position_embeddings)
        config = dataclasses.replace(config, vocab_size=data.vocab_size, max_position_embeddings=longest)
    if args.one in PEERS and args.device.startswith("cuda") and config.share != "none":
        args.micro_batch //= 2
    torch.manual_seed(0)
    cuda = args.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    tokens, cost = args.micro_batch * context, model_cost(config, context)
    if args.one == WHOLE_RUN:
        seconds_of_200, median_of_one = whole_run(config, args)
        return {
            "tokens_per_second": 200 * tokens / seconds_of_200,
            "tokens_per_second_of_the_median_step": tokens / median_of_one,
            "steps": 200,
        }
    started = time.perf_counter()
    step = CONTENDERS[args.one](config, data, args)
    losses = [float(step(number)) for number in range(args.warm_up)]
    synchronize()
    first = time.perf_counter() - started
    seconds, power = [], {}
    for block in np.array_split(np.arange(args.warm_up, args.warm_up + args.steps), BLOCKS):
        before = time.perf_counter()
        for number in block:
            step(int(number))
        power = power_state() if cuda else {}
        synchronize()
        seconds.append((time.perf_counter() - before) / len(block))
    median = float(np.median(seconds))
    return {
        "micro_batch": args.micro_batch,
        "tokens_per_second": tokens / median,
        "step_milliseconds": {"median": median * 1e3, "least": min(seconds) * 1e3, "most": max(seconds) * 1e3},
        "mfu_causal": cost.training_flops_causal * tokens / median / BF16_PEAK if cuda else None,
        "mfu_full": cost.training_flops_full * tokens / median / BF16_PEAK if cuda else None,
        **power,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "seconds_to_first_steps": first,
        "losses": losses,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def power_state() -> dict[str, float]:
    """Return the GPU's watts and the clock it keeps at them, where nvidia-ml-py reads them: a GPU at its limit clocks down."""
    try:
        return {"watts": torch.cuda.power_draw() / 1e3, "sm_megahertz": torch.cuda.clock_rate()}
    except ModuleNotFoundError:
        return {}


def compare(args: argparse.Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure each contender in a process of its own; yield what is known after each of them, ``earlier`` included."""
    found = dict(earlier)
    for name in args.contenders:
        found[name] = measure_apart(args.preset, name, args.limit)
        yield {"contenders": found, "ratios": ratios_of(found)}


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """Return our speeds over those of the plain contenders of the same precision, and of the peers, which are in bfloat16."""
    ratios = {}
    for mine in (name for name in found if name.startswith("ours") and "tokens_per_second" in found[name]):
        rivals = RIVALS["ours, float8" if "float8" in mine else "ours"]
        for name in (*rivals, *PEERS, *(("ours",) if mine in (WHOLE_RUN, REPEATABLE) else ())):
            if "tokens_per_second" in found.get(name, {}):
                ratios[f"{mine} / {name}"] = found[mine]["tokens_per_second"] / found[name]["tokens_per_second"]
    return ratios


def are_alike(here: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Tell whether an earlier result is of the same hour, machine, commit and batch, so that this one may go on with it."""

    def facts(result: dict[str, Any]) -> tuple[Any, ...]:
        environment = result["environment"]
        return result["micro_batch"], environment["date"][:13], *(environment[key] for key in ("machine", "commit"))

    return facts(here) == facts(earlier)


def show(title: str, result: dict[str, Any]) -> None:
    """Print a comparison."""
    rows = []
    for name, facts in result["contenders"].items():
        if "error" in facts:
            rows.append((name, "failed", *facts["error"], "", "", ""))
            continue
        shown = zip(("mfu_causal", "mfu_full", "peak_gib"), ("{:.1%}", "{:.1%}", "{:.1f}"), strict=True)
        on_gpu = [form.format(facts[key]) if facts.get(key) else "" for key, form in shown]
        clock = f"{facts['watts']:.0f} W, {facts['sm_megahertz']} MHz" if "watts" in facts else ""
        rows.append((name, f"{facts['tokens_per_second']:,.0f}", *on_gpu, clock))
    table(title, ["contender", "tokens/s", "MFU, causal", "MFU, full", "peak GiB", "power, clock"], rows)
    table("ratios", ["of tokens/s", ""], [(name, f"{ratio:.3f} ×") for name, ratio in result["ratios"].items()])


def main() -> None:
    """Compare, or measure one contender here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mobillama-0.5b", help="(default: %(default)s)")
    names = [*CONTENDERS, WHOLE_RUN]
    parser.add_argument("--contenders", nargs="+", choices=names, metavar="NAME", help="(default: those of the device)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: the preset's)")
    parser.add_argument("--data", type=Path, help="prepared data to learn from instead of random ids")
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help="timed steps, in three blocks of which the median counts (default: %(default)s)",
    )
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="ours without compilation, as on a CPU without compiler")
    parser.add_argument("--limit", type=int, default=150, help="seconds for a contender (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to (default: %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    args.contenders = args.contenders or DEFAULTS[args.device.partition(":")[0]]
    machine = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    key = f"{args.preset}, {machine}{', data' if args.data else ''}"
    known = read_json(args.out) if args.out.exists() else {}
    here = {"environment": environment(), "micro_batch": args.micro_batch}
    earlier = known.get(key, {})
    for compared in compare(args, earlier["contenders"] if earlier and are_alike(here, earlier) else {}):
        result = {**here, **compared}
        write_json(args.out, {**known, key: result})
    show(key, result)


if __name__ == "__main__":
    main()
