"""Checkpoints that are whole or do not count: ``step-N/{model/, optimizer/, state.json, manifest.json}``.

The manifest is written last; a directory without one is an interrupted save (:mod:`mobillama.train.saver`). Before use every
file is hashed; a damaged checkpoint is passed over for the newest whole one. The model is one file, the optimizer's memory
is in as many as processes wrote it; both are safetensors, which torch's distributed checkpointing reads back into any
number of processes.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from mobillama.directory import CHECKPOINT_FORMAT
from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import read_json
from mobillama.record.manifest import MANIFEST_NAME, find_damage, read_manifest

# It says so whenever one process saves or loads by itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# What each optimizer remembers of a parameter; AdamW besides counts its updates.
_MEMORY: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` steps."""
    return directory / f"step-{step:06d}"


def work_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps is written before it gets its name."""
    return directory / f".step-{step:06d}.tmp"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (steps, path) of the committed checkpoints, oldest first; not yet verified."""
    return [(step, path) for step, path in _step_directories(directory) if (path / MANIFEST_NAME).is_file()]


def _step_directories(directory: Path) -> list[tuple[int, Path]]:
    """Return (steps, path) of the directories that have a checkpoint's name, oldest first."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in directory.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what interrupted saves left (temporary directories, checkpoints without manifest); return their paths."""
    leftovers = list(directory.glob(".step-*.tmp"))
    leftovers += [path for _, path in _step_directories(directory) if not (path / MANIFEST_NAME).is_file()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def keep_newest(directory: Path, step: int, count: int, every: int = 0) -> None:
    """Remove all but the ``count`` newest checkpoints up to ``step`` (0 keeps all) and those at multiples of ``every``.

    Newer ones are those that a resume passed over as damaged: they are replaced when their step comes again. The manifest
    goes first, so that no checkpoint is left half.
    """
    past = [(number, path) for number, path in list_checkpoints(directory) if number <= step]
    for number, path in past[:-count] if count else []:
        if not every or number % every:
            (path / MANIFEST_NAME).unlink()
            shutil.rmtree(path)


def newest_whole_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are all as written, and a line on each damaged one passed over.

    Raises:
        CorruptDataError: there are checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    for _, path in reversed(list_checkpoints(directory)):
        try:
            damage = find_damage(path, read_manifest(path, CHECKPOINT_FORMAT))
        except (CorruptDataError, UsageError) as error:
            damage = str(error)
        if damage is None:
            return path, damaged
        damaged.append(damage)
    if damaged:
        raise CorruptDataError(f"{damaged[0]}; no other checkpoint is whole: restore one or remove {directory}")
    return None, damaged


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json."""
    return read_json(path / "state.json")


def remembered_parameters(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, nn.Parameter]:
    """Return, for each name of :func:`optimizer_tensors`, the parameter that it is remembered of."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[parameter]}": parameter
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key in _MEMORY[type(optimizer)]
    }


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return what the optimizers remember, each process its own part, by the parameters' names."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[parameter]}": memory[key]
        for optimizer in optimizers
        for parameter, memory in optimizer.state.items()
        for key in _MEMORY[type(optimizer)]
    }


def count_updates(optimizers: list[torch.optim.Optimizer]) -> int:
    """Return how often AdamW has updated its parameters."""
    counts = (state["step"] for optimizer in optimizers for state in optimizer.state.values() if "step" in state)
    return int(next(counts, 0))


def load_optimizers(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load what a model's optimizers remembered at a checkpoint, bit for bit, each process its own part of it.

    Raises:
        CorruptDataError: a file is damaged or does not fit the model.
    """
    updates = read_state(path)["updates"]
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            memory = {key: torch.zeros_like(parameter) for key in _MEMORY[type(optimizer)]}
            if isinstance(optimizer, torch.optim.AdamW):  # it counts in a float32 tensor of each parameter
                memory["step"] = torch.tensor(float(updates), device=parameter.device)
            optimizer.state[parameter] = memory
    load_tensors(path / "optimizer", optimizer_tensors(model, optimizers))


def load_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` from the safetensors files of a directory, which must hold exactly these, by their names there.

    Raises:
        CorruptDataError: a file is damaged or does not fit.
    """
    reader = HuggingFaceStorageReader(str(directory))
    try:
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise CorruptDataError(f"{directory}: damaged or truncated ({error}); restore it from a copy") from None
    wrong = sorted(tensors.keys() ^ stored.keys()) or sorted(
        name for name, tensor in tensors.items() if tensor.shape != stored[name].size
    )
    if wrong:
        raise CorruptDataError(f"{directory}: does not fit the recipe's model: {', '.join(wrong[:3])}")
    load(tensors, storage_reader=reader, no_dist=True)
