"""Checkpoints that are whole or do not count: ``step-N/{model/, optimizer/, state.json, manifest.json}``.

A save writes a temporary directory, flushes it, renames it, and writes the manifest last; a directory without manifest is
an interrupted save. Before use every file is hashed; a damaged checkpoint is passed over for the newest whole one.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.data.tokenizer import Tokenizer
from mobillama.directory import CHECKPOINT_FORMAT, WEIGHTS_FILE, read_weights, save_model, save_tensors
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import ModelConfig
from mobillama.record.files import fsync_directory, fsync_tree, read_json, write_json
from mobillama.record.manifest import MANIFEST_NAME, find_damage, read_manifest, write_manifest

OPTIMIZER_FILE = "optimizer.safetensors"
# What each optimizer remembers of a parameter; AdamW besides counts its updates.
_MEMORY: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` steps."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (steps, path) of the committed checkpoints, oldest first; not yet verified."""
    return [(step, path) for step, path in _step_directories(directory) if (path / MANIFEST_NAME).is_file()]


def _step_directories(directory: Path) -> list[tuple[int, Path]]:
    """Return (steps, path) of the directories that have a checkpoint's name, oldest first."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in directory.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def save_checkpoint(
    directory: Path,
    step: int,
    config: ModelConfig,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    state: dict[str, Any],
) -> Path:
    """Write and commit the checkpoint after ``step`` steps; return its path.

    Raises:
        UsageError: the disk is full or cannot be written; nothing that was committed is touched.
    """
    final = checkpoint_path(directory, step)
    work = directory / f".step-{step:06d}.{os.getpid()}.tmp"
    try:
        save_model(work / "model", config, model.state_dict(), tokenizer)
        (work / "optimizer").mkdir()
        save_tensors(work / "optimizer" / OPTIMIZER_FILE, _optimizer_tensors(model, optimizers))
        write_json(work / "state.json", {**state, "step": step, "updates": _updates(optimizers)})
        fsync_tree(work)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        fsync_directory(directory)
        write_manifest(final, {"format": CHECKPOINT_FORMAT, "step": step})
    except OSError as error:
        raise UsageError(
            f"{final}: cannot be written ({error.strerror}); free space and run the same command again"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what interrupted saves left (temporary directories, checkpoints without manifest); return their paths."""
    leftovers = list(directory.glob(".step-*.tmp"))
    leftovers += [path for _, path in _step_directories(directory) if not (path / MANIFEST_NAME).is_file()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def keep_newest(directory: Path, step: int, count: int) -> None:
    """Remove all but the ``count`` newest checkpoints up to ``step`` (0 keeps all).

    Newer ones are those that a resume passed over as damaged: they are replaced when their step comes again. The manifest
    goes first, so that no checkpoint is left half.
    """
    past = [path for number, path in list_checkpoints(directory) if number <= step]
    for path in past[:-count] if count else []:
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


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load weights and what the optimizers remember into ``model`` and ``optimizers``, bit for bit.

    Raises:
        CorruptDataError: a file is damaged or does not fit the model.
    """
    weights = read_weights(path / "model" / WEIGHTS_FILE)
    moments = read_weights(path / "optimizer" / OPTIMIZER_FILE)
    updates = read_state(path)["updates"]
    try:
        model.load_state_dict(weights)
        names = {parameter: name for name, parameter in model.named_parameters()}
        for optimizer in optimizers:
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                memory = {key: moments[f"{key}.{names[parameter]}"] for key in _MEMORY[type(optimizer)]}
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in memory.items()}
                if isinstance(optimizer, torch.optim.AdamW):  # it counts in a float32 tensor of each parameter
                    optimizer.state[parameter]["step"] = torch.tensor(float(updates), device=parameter.device)
    except (RuntimeError, KeyError) as error:
        raise CorruptDataError(
            f"{path}: does not fit the recipe's model ({' '.join(str(error).split())[:200]})"
        ) from None


def _optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[parameter]}": memory[key]
        for optimizer in optimizers
        for parameter, memory in optimizer.state.items()
        for key in _MEMORY[type(optimizer)]
    }


def _updates(optimizers: list[torch.optim.Optimizer]) -> int:
    counts = (state["step"] for optimizer in optimizers for state in optimizer.state.values() if "step" in state)
    return max(map(int, counts), default=0)
