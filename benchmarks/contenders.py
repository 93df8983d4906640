"""The contenders of benchmarks/train.py: each makes a function that takes one optimizer step, of the same computation.

Peers that cannot share layers' weights compute the same with weights of their own. A step's loss may stay on the GPU: only
ours reads it in every step, as a run does to judge it before the update.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mobillama.recipe import ModelConfig, OptimizerConfig, PretrainRecipe, TrainConfig
from mobillama.train.background import Background
from mobillama.train.step import Stepper
from mobillama.train.task import Pretraining
from mobillama.train.world import World

Step = Callable[[int], torch.Tensor | float]


def our_train_config(args: argparse.Namespace, float8: bool, fused: bool, deterministic: bool = False) -> TrainConfig:
    """How our contenders train."""
    return TrainConfig(
        steps=args.warm_up + args.steps,
        batch_size=args.micro_batch,
        micro_batch_size=args.micro_batch,
        precision="bfloat16",
        device=args.device,
        compile=not args.eager,
        fused=fused and is_hopper(args.device),
        float8=float8,
        deterministic=deterministic,
        checkpoint_every=200,
        keep_checkpoints=1,
        validate_every=0,
    )


def is_hopper(device: str) -> bool:
    """Tell whether the fused step runs there."""
    return device.startswith("cuda") and torch.cuda.get_device_capability()[0] == 9


def ours(
    config: ModelConfig, data: Any, args: argparse.Namespace, float8: bool, fused: bool, deterministic: bool = False
) -> Step:
    """Our step, as a run takes it."""
    train = our_train_config(args, float8, fused, deterministic)
    recipe = PretrainRecipe("", "", model=config, optimizer=OptimizerConfig(warmup_steps=0), train=train)
    stepper = Stepper(Pretraining(recipe, data), World(0, 1, 1, torch.device(args.device)))

    def step(number: int) -> float:
        computed = stepper.gradient(number)
        stepper.update(3e-4, computed)
        return computed.numbers().loss

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
    if compiled:
        model.compile()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous()).loss

    return _fed(_descent(model, loss_of), data, args)


def litgpt(config: ModelConfig, data: Any, args: argparse.Namespace) -> Step:
    """litgpt's GPT of the same compute in the step of its ``pretrain``: nothing shared, compiled, bf16-mixed."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = {
        "block_size": data.sequence_length - 1,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    model = GPT(Config(**shape)).to(args.device)
    compiled = torch.compile(model)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(compiled(ids[:, :-1]), ids[:, 1:])

    return _fed(_descent(model, loss_of), data, args)


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


def _descent(
    model: torch.nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a peer's step: bfloat16 autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _fed(step: Callable[[torch.Tensor], torch.Tensor], data: Any, args: argparse.Namespace) -> Step:
    def take(number: int) -> torch.Tensor:
        ids = data.batch(0, number, args.micro_batch, slice(None)).ids
        return step(torch.from_numpy(ids).to(args.device))

    return take


CONTENDERS: dict[str, Callable[..., Step]] = {
    "ours": lambda *a: ours(*a, float8=False, fused=True),
    "ours, deterministic": lambda *a: ours(*a, float8=False, fused=True, deterministic=True),
    "ours, compiled": lambda *a: ours(*a, float8=False, fused=False),
    "plain": lambda *a: plain(*a, float8=False, regional=False),
    "plain, by layer": lambda *a: plain(*a, float8=False, regional=True),
    "litgpt": litgpt,
    "transformers": lambda *a: transformers(*a, compiled=True),
    "transformers, eager": lambda *a: transformers(*a, compiled=False),
    "Trainer": lambda *a: trainer(*a, compiled=True),
    "Trainer, eager": lambda *a: trainer(*a, compiled=False),
    "ours, float8": lambda *a: ours(*a, float8=True, fused=True),
    "ours, float8, compiled": lambda *a: ours(*a, float8=True, fused=False),
    "plain, float8": lambda *a: plain(*a, float8=True, regional=False),
    "plain, float8, by layer": lambda *a: plain(*a, float8=True, regional=True),
}
PEERS = ("litgpt", "transformers", "transformers, eager", "Trainer", "Trainer, eager")
