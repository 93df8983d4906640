"""Speed and memory of a training step: ours, a plain reference, and peers, one after another in one go.

    python benchmarks/train.py                                   # one GPU: every contender on mobillama-0.5b
    python benchmarks/train.py --preset baseline2 --contenders ours plain
    python benchmarks/train.py --device cpu --preset mobillama-tiny --micro-batch 8

Each contender runs in a process of its own on the same shape, batch and kind of tokens; what counts is the ratio, since
the next machine is another one. The plain reference (benchmarks/plain.py) is compiled as a whole and layer by layer, and
the faster of the two is what ours is compared with. A step is forward, backward, clipping and AdamW.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobillama.console import note, table
from mobillama.data.dataset import Batch, Dataset
from mobillama.model.cost import model_cost
from mobillama.recipe import PRESETS, ModelConfig, OptimizerConfig, PretrainRecipe, TrainConfig
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.train.background import Background
from mobillama.train.step import Stepper
from mobillama.train.world import World

RESULTS = Path(__file__).parent / "results" / "train.json"
BF16_PEAK = 989e12  # an H100's, dense; model FLOPs utilisation (MFU) is stated as a share of it
Step = Callable[[int], float]


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


def ours(config: ModelConfig, data: Any, args: argparse.Namespace, float8: bool, memory: str) -> Step:
    """Our step, as a run takes it."""
    train = TrainConfig(
        batch_size=args.micro_batch,
        micro_batch_size=args.micro_batch,
        precision="bfloat16",
        device=args.device,
        compile=not args.eager,
        float8=float8,
        activation_checkpointing=memory,  # type: ignore[arg-type]
    )
    recipe = PretrainRecipe("", "", model=config, optimizer=OptimizerConfig(warmup_steps=0), train=train)
    stepper = Stepper(recipe, data, World(0, 1, 1, torch.device(args.device)))

    def step(number: int) -> float:
        numbers = stepper.gradient(number)
        stepper.update(3e-4)
        return numbers.loss

    return step


def plain(config: ModelConfig, data: Any, args: argparse.Namespace, float8: bool, regional: bool) -> Step:
    """The plain reference."""
    from plain import plain_step

    shape = {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "blocks": 1 if config.share == "block" else config.num_hidden_layers,
        "ffns": config.num_hidden_layers if config.share == "none" else 1,
        "context": data.sequence_length - 1,
    }
    return _fed(plain_step(shape, args.device, float8, regional), data, args)


def transformers(config: ModelConfig, data: Any, args: argparse.Namespace, compiled: bool) -> Step:
    """LlamaForCausalLM of the same compute: nothing shared, which transformers cannot."""
    from transformers import LlamaForCausalLM

    from mobillama.hf.unshare import stock_config

    model = LlamaForCausalLM._from_config(stock_config(config), dtype=torch.float32).to(args.device)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if compiled:
        model.compile()

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            loss = model(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return _fed(step, data, args)


def trainer(config: ModelConfig, data: Any, args: argparse.Namespace, compiled: bool) -> Step:
    """The same LlamaForCausalLM under transformers' Trainer, whose own loop goes on by a step whenever one is asked for."""
    from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from mobillama.hf.unshare import stock_config

    steps = args.warm_up + args.steps
    asked, losses = threading.Semaphore(0), queue.SimpleQueue[float]()

    class Rows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for number in range(steps):
                for row in torch.from_numpy(data.batch(0, number, args.micro_batch, slice(None)).ids):
                    yield {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}

    class OneByOne(TrainerCallback):
        def on_step_begin(self, *unused: Any, **named: Any) -> None:
            asked.acquire()

        def on_log(self, *unused: Any, logs: dict[str, float], **named: Any) -> None:
            if "loss" in logs:
                losses.put(logs["loss"])

    model = LlamaForCausalLM._from_config(stock_config(config), dtype=torch.float32)
    model.config.use_cache = False
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=args.micro_batch,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=args.device == "cpu",
        torch_compile=compiled,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    loop = Trainer(model, settings, train_dataset=Rows(), callbacks=[OneByOne()])
    loop.remove_callback(PrinterCallback)
    running = Background(loop.train)
    atexit.register(running.join)  # an interpreter that ends before its threads crashes

    def step(number: int) -> float:
        asked.release()
        while not running.error:
            with contextlib.suppress(queue.Empty):
                return losses.get(timeout=1)
        raise running.error

    return step


def _fed(step: Callable[[torch.Tensor], torch.Tensor], data: Any, args: argparse.Namespace) -> Step:
    def take(number: int) -> float:
        ids = data.batch(0, number, args.micro_batch, slice(None)).ids
        return float(step(torch.from_numpy(ids).to(args.device)))

    return take


CONTENDERS: dict[str, Callable[..., Step]] = {
    "ours": lambda *a: ours(*a, float8=False, memory="none"),
    "ours, selective": lambda *a: ours(*a, float8=False, memory="selective"),
    "plain": lambda *a: plain(*a, float8=False, regional=False),
    "plain, by layer": lambda *a: plain(*a, float8=False, regional=True),
    "transformers": lambda *a: transformers(*a, compiled=True),
    "transformers, eager": lambda *a: transformers(*a, compiled=False),
    "Trainer": lambda *a: trainer(*a, compiled=True),
    "Trainer, eager": lambda *a: trainer(*a, compiled=False),
    "ours, float8": lambda *a: ours(*a, float8=True, memory="none"),
    "ours, float8, selective": lambda *a: ours(*a, float8=True, memory="selective"),
    "plain, float8": lambda *a: plain(*a, float8=True, regional=False),
    "plain, float8, by layer": lambda *a: plain(*a, float8=True, regional=True),
}
PEERS = ("transformers", "transformers, eager", "Trainer", "Trainer, eager")
DEFAULTS = {
    "cpu": ["ours", "plain", "plain, by layer", *PEERS],
    "cuda": [name for name in CONTENDERS if not name.startswith("Trainer")],
}
RIVALS = {"ours": ("plain", "plain, by layer"), "ours, float8": ("plain, float8", "plain, float8, by layer")}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of one contender, in this process."""
    config = PRESETS[args.preset][0]
    context = min(args.context or config.max_position_embeddings, config.max_position_embeddings)
    data: Any = RandomTokens(config.vocab_size, context, 64)
    if args.data:
        data = Dataset(args.data)
        config, context = dataclasses.replace(config, vocab_size=data.vocab_size), data.sequence_length - 1
    torch.manual_seed(0)
    cuda = args.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    started = time.perf_counter()
    step = CONTENDERS[args.one](config, data, args)
    losses = [step(number) for number in range(args.warm_up)]
    synchronize()
    first = time.perf_counter() - started
    seconds = []
    for number in range(args.steps):
        before = time.perf_counter()
        step(args.warm_up + number)
        synchronize()
        seconds.append(time.perf_counter() - before)
    tokens, median, cost = args.micro_batch * context, float(np.median(seconds)), model_cost(config, context)
    return {
        "tokens_per_second": tokens / median,
        "step_milliseconds": {"median": median * 1e3, "least": min(seconds) * 1e3, "most": max(seconds) * 1e3},
        "mfu_causal": cost.training_flops_causal * tokens / median / BF16_PEAK if cuda else None,
        "mfu_full": cost.training_flops_full * tokens / median / BF16_PEAK if cuda else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "seconds_to_first_steps": first,
        "losses": losses,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure each contender in a process of its own; yield what is known after each of them."""
    found: dict[str, Any] = {}
    for name in args.contenders:
        note(f"{args.preset}: {name} …")
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            found[name] = json.loads(lines[-1]) if lines else {"error": done.stderr.strip().splitlines()[-1:]}
        except subprocess.TimeoutExpired:
            found[name] = {"error": [f"took longer than {args.limit} s"]}
        note(f"  {found[name].get('tokens_per_second', found[name])}")
        yield {"contenders": found, "ratios": ratios_of(found)}


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """Return our speeds over those of the contenders of the same precision."""
    ratios = {}
    for mine in (name for name in found if name.startswith("ours") and "tokens_per_second" in found[name]):
        rivals = RIVALS["ours, float8" if "float8" in mine else "ours"]
        for name in (*rivals, *PEERS):
            if "tokens_per_second" in found.get(name, {}):
                ratios[f"{mine} / {name}"] = found[mine]["tokens_per_second"] / found[name]["tokens_per_second"]
    return ratios


def show(title: str, result: dict[str, Any]) -> None:
    """Print a comparison."""
    rows = []
    for name, facts in result["contenders"].items():
        if "error" in facts:
            rows.append((name, "failed", *facts["error"], "", ""))
            continue
        shown = zip(("mfu_causal", "mfu_full", "peak_gib"), ("{:.1%}", "{:.1%}", "{:.1f}"), strict=True)
        on_gpu = ["" if facts[key] is None else form.format(facts[key]) for key, form in shown]
        rows.append((name, f"{facts['tokens_per_second']:,.0f}", *on_gpu))
    table(title, ["contender", "tokens/s", "MFU, causal", "MFU, full", "peak GiB"], rows)
    table("ratios", ["of tokens/s", ""], [(name, f"{ratio:.3f} ×") for name, ratio in result["ratios"].items()])


def main() -> None:
    """Compare, or measure one contender here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="mobillama-0.5b", help="(default: %(default)s)")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="(default: those of the device)"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: the preset's)")
    parser.add_argument("--data", type=Path, help="prepared data to learn from instead of random ids")
    parser.add_argument("--steps", type=int, default=12, help="timed steps; their median counts (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="ours without compilation, as on a CPU without compiler")
    parser.add_argument("--limit", type=int, default=150, help="seconds for a contender (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to (default: %(default)s)")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    args.contenders = args.contenders or DEFAULTS[args.device.partition(":")[0]]
    key = f"{args.preset} {args.device}{' data' if args.data else ''}"
    known = read_json(args.out) if args.out.exists() else {}
    for compared in compare(args):
        result = {"environment": environment(), "micro_batch": args.micro_batch, **compared}
        write_json(args.out, {**known, key: result})
    show(key, result)


if __name__ == "__main__":
    main()
