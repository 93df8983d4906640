"""Checkpoints that are whole or do not count: ``step-N/{model/, optimizer/, state.json, manifest.json}``.

A save writes a temporary directory, flushes it, renames it, and writes the manifest last; a directory without manifest is
an interrupted save. Before use every file is hashed; a damaged checkpoint is passed over for the newest whole one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mobillama.data.tokenizer import Tokenizer
from mobillama.directory import WEIGHTS_FILE, read_weights, save_model
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import ModelConfig
from mobillama.record.files import fsync_directory, fsync_tree, write_json
from mobillama.record.manifest import MANIFEST_NAME, find_damage, read_manifest, write_manifest

FORMAT = "mobillama-checkpoint-1"
OPTIMIZER_FILE = "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` steps."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (steps, path) of the committed checkpoints, oldest first; not yet verified."""
    found = []
    for path in directory.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / MANIFEST_NAME).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(
    directory: Path,
    step: int,
    config: ModelConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
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
        save_file(_optimizer_tensors(model, optimizer), work / "optimizer" / OPTIMIZER_FILE)
        write_json(work / "state.json", {**state, "step": step, "updates": _updates(optimizer)})
        fsync_tree(work)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        fsync_directory(directory)
        write_manifest(final, {"format": FORMAT, "step": step})
    except OSError as error:
        raise UsageError(
            f"{final}: cannot be written ({error.strerror}); free space and run the same command again"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def remove_leftovers(directory: Path) -> None:
    """Remove what interrupted saves left: temporary directories and directories without manifest."""
    for path in [*directory.glob(".step-*.tmp"), *directory.glob("step-*")]:
        if path.suffix == ".tmp" or not (path / MANIFEST_NAME).is_file():
            shutil.rmtree(path, ignore_errors=True)


def keep_newest(directory: Path, count: int) -> None:
    """Remove all but the ``count`` newest checkpoints (0 keeps all); the manifest goes first, so none is left half."""
    for _, path in list_checkpoints(directory)[:-count] if count else []:
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
            damage = find_damage(path, read_manifest(path, FORMAT))
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
    return dict(json.loads((path / "state.json").read_text(encoding="utf-8")))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and the optimizer's moments into ``model`` and ``optimizer``, bit for bit.

    Raises:
        CorruptDataError: a file is damaged or does not fit the model.
    """
    weights = read_weights(path / "model" / WEIGHTS_FILE)
    moments = read_weights(path / "optimizer" / OPTIMIZER_FILE)
    updates = read_state(path)["updates"]
    try:
        model.load_state_dict(weights)
        for name, parameter in model.named_parameters():
            own = {moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
            # AdamW counts updates in a float32 tensor of each parameter.
            optimizer.state[parameter] = {**own, "step": torch.tensor(float(updates), device=parameter.device)}
    except (RuntimeError, KeyError) as error:
        raise CorruptDataError(
            f"{path}: does not fit the recipe's model ({' '.join(str(error).split())[:200]})"
        ) from None


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment].contiguous()
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def _updates(optimizer: torch.optim.Optimizer) -> int:
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)
