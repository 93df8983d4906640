"""What a pre-training run would take: memory, steps, checkpoints, disk, hours. Nothing is trained or written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mobillama.console import table
from mobillama.data.dataset import Dataset
from mobillama.errors import UsageError
from mobillama.model.cost import model_cost
from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig, PretrainRecipe
from mobillama.record.manifest import MANIFEST_NAME
from mobillama.train.cadence import checkpoint_bytes, checkpoint_due, kept_checkpoints
from mobillama.train.meters import GPUS, peak_flops
from mobillama.train.parallel import layer_groups

# Share of the peak that our step reached on one H100 at mobillama-0.5b (benchmarks/train.py, attention counted causally), by
# fused layers or not.
MEASURED_MFU = {True: 0.56, False: 0.52}
# Residual-wide 16-bit numbers that a layer keeps of a token for its backward pass, and inner-wide ones.
_KEPT = {"none": (9, 2), "selective": (6, 2), "fused": (6, 2), "full": (1, 0)}
_PLAIN_BYTES = 16  # float32 weight, gradient and AdamW's two moments
_GATHERED_BYTES = 8  # float32 weight and gradient
_AMBER_CHUNKS, _AMBER_CHUNK = 360, 1_706_976


def plan(recipe: PretrainRecipe, gpus: int, gpu: str, gpus_per_node: int) -> dict[str, Any]:
    """Return what ``recipe`` would take on ``gpus`` devices of a kind.

    Args:
        recipe: the run; its data are looked at where they are there, else they count as Amber's.
        gpus: number of devices.
        gpu: a name of :data:`mobillama.train.meters.GPUS`, for example H100.
        gpus_per_node: devices of a machine, for hsdp.

    Raises:
        UsageError: the GPU is not known, or the devices cannot share a batch.
    """
    train, model = recipe.train, recipe.model
    peak = peak_flops(gpu)
    if peak is None:
        raise UsageError(f"--gpu: '{gpu}' is not known; use one of {', '.join(name for name, _, _, _ in GPUS)}")
    for option, count in (("--gpus", gpus), ("--gpus-per-node", gpus_per_node)):
        if count < 1:
            raise UsageError(f"{option}: {count} is not a positive number")
    if train.batch_size % gpus:
        raise UsageError(f"--gpus: {gpus} devices cannot share train.batch_size {train.batch_size} equally")
    has_data = (Path(recipe.data) / MANIFEST_NAME).is_file()
    dataset = Dataset(Path(recipe.data)) if has_data else None
    context = dataset.sequence_length - 1 if dataset else model.max_position_embeddings
    ends = dataset.chunk_ends if dataset else [_AMBER_CHUNK * (n + 1) for n in range(_AMBER_CHUNKS)]
    written, on_disk = kept_checkpoints(recipe, checkpoint_due(train, context, ends))
    cost = model_cost(model, context)
    tokens = train.steps * train.batch_size * context
    micro = min(train.micro_batch_size, train.batch_size // gpus)
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, train.shard_ranks or gpus_per_node)}[train.parallelism]
    state = _PLAIN_BYTES * cost.stored_parameters / shards + (_GATHERED_BYTES * _gathered(model) if shards > 1 else 0)
    whole = "fused" if train.fused else "none"
    way = whole if train.activation_checkpointing == "none" else train.activation_checkpointing
    kept = model.num_hidden_layers * _kept(model, way)
    if way == "full":
        kept += _kept(model, whole)  # of the layer that is computed again
    mfu = MEASURED_MFU[train.fused]
    hours = tokens * cost.training_flops_causal / (gpus * peak * mfu) / 3600
    return {
        "parameters": cost.stored_parameters,
        "steps": train.steps,
        "tokens": tokens,
        "epochs": train.steps * train.batch_size / ends[-1],
        "data": str(recipe.data) if dataset else "not prepared yet; taken to be Amber's 360 chunks",
        "state_gib": state / 2**30,
        "activations_gib": 2 * kept * micro * context / 2**30,
        "micro_batches": -(-train.batch_size // gpus // micro),
        "checkpoints": written,
        "checkpoints_kept": on_disk,
        "checkpoint_gb": checkpoint_bytes(recipe) / 1e9,
        "disk_gb": on_disk * checkpoint_bytes(recipe) / 1e9,
        "disk_free_gb": shutil.disk_usage(_existing(Path(recipe.run))).free / 1e9,
        "gpus": gpus,
        "gpu": gpu,
        "mfu_assumed": mfu,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "tokens_per_second_per_gpu": peak * mfu / cost.training_flops_causal,
    }


def show_plan(recipe: PretrainRecipe, gpus: int, gpu: str, gpus_per_node: int) -> None:
    """Print :func:`plan` for people."""
    facts = plan(recipe, gpus, gpu, gpus_per_node)
    total = facts["state_gib"] + facts["activations_gib"]
    short = " (less than needed)" if facts["disk_gb"] > facts["disk_free_gb"] else ""
    rows = [
        ("parameters stored", f"{facts['parameters']:,}"),
        ("steps", f"{facts['steps']:,}"),
        ("tokens", f"{facts['tokens']:,} · {facts['epochs']:.3g} epochs"),
        ("data", facts["data"]),
        ("memory of a GPU, estimated", f"{total:.1f} GiB"),
        ("  weights, gradient, moments", f"{facts['state_gib']:.1f} GiB ({recipe.train.parallelism})"),
        ("  activations", f"{facts['activations_gib']:.1f} GiB · {facts['micro_batches']} micro-batches a step"),
        ("checkpoints", f"{facts['checkpoints']:,} written, {facts['checkpoints_kept']:,} on disk"),
        ("disk", f"{facts['disk_gb']:,.1f} GB · {facts['checkpoint_gb']:.1f} GB each"),
        ("disk free here", f"{facts['disk_free_gb']:,.1f} GB{short}"),
        ("hours, estimated", f"{facts['hours']:,.1f} on {gpus} × {gpu} · {facts['gpu_hours']:,.0f} GPU hours"),
        ("tokens/s of a GPU, estimated", f"{facts['tokens_per_second_per_gpu']:,.0f}"),
    ]
    table(f"{recipe.run}: what it would take", ["", "plan"], rows)
    print(
        f"Hours assume {facts['mfu_assumed']:.0%} of the GPU's bfloat16 peak, what one H100 reached at mobillama-0.5b "
        "(benchmarks/train.py);\nthey leave out communication between GPUs, what float8 gains and activation checkpointing "
        "costs.\n"
        "Memory is computed from the shape; the CUDA context and buffers come on top."
    )


def _kept(model: ModelConfig, mode: str) -> int:
    """Return how many 16-bit numbers a layer keeps of a token for its backward pass."""
    wide, inner = _KEPT[mode]
    return wide * model.hidden_size + inner * model.intermediate_size


def _gathered(config: ModelConfig) -> int:
    """Return the numbers that FSDP holds whole at a time: the root's, a layer's, and those of the layer that comes next."""
    with torch.device("meta"):
        model = MobiLlama(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    groups = layer_groups(model.model)
    layers = [sum(p.numel() for part in group for p in part.parameters()) for group in groups]
    return whole - sum(layers) + 2 * max(layers, default=0)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
