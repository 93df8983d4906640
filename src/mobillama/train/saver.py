"""Saves checkpoints while training goes on: a copy of all tensors is made at once, files are written in the background.

A save writes a temporary directory (each process its own part), flushes it, renames it, and writes the manifest last. One
save is under way at a time; the next one waits for it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from mobillama.directory import CHECKPOINT_FORMAT, WEIGHTS_FILE, save_tensors
from mobillama.errors import UsageError
from mobillama.record.files import fsync_directory, fsync_tree, write_json
from mobillama.record.manifest import read_manifest, write_manifest
from mobillama.train.background import Background
from mobillama.train.checkpoint import (
    checkpoint_path,
    count_updates,
    keep_newest,
    optimizer_tensors,
    read_state,
    remembered_parameters,
    work_path,
)
from mobillama.train.weights import fingerprint, local_part
from mobillama.train.world import World

_PATIENCE = 10.0  # seconds between words about a checkpoint that keeps training waiting
_LAST_PATIENCE = 120.0  # seconds that a run which has failed waits for the checkpoint under way


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    path: Path
    step: int
    digests: dict[str, str]
    """sha256 of the model's weights, fingerprint of the optimizer's memory, which may lie in any number of files."""
    seconds: float
    """From the start of the copy to the commit."""
    held_up: float
    """Seconds that training stood still for it: for the copy, and for its files if the next save or the end came first."""


class Saver:
    """The checkpoints of a run, written by all its processes.

    Args:
        directory: holds the checkpoints.
        world: the processes; all of them call every method at the same step.
        save_weights: writes the model's directories into a checkpoint's, from a copy of its state dict.
        keep: newest checkpoints to keep; 0 keeps all.
        keep_every: of the others, those at multiples of this step are kept; 0: none.
        on_note: told when training waits for files.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        save_weights: Callable[[Path, dict[str, Tensor]], None],
        keep: int = 0,
        keep_every: int = 0,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.directory, self.world, self.save_weights = directory, world, save_weights
        self.keep, self.keep_every, self.on_note = keep, keep_every, on_note
        # A group of its own: what it does in the background must not mix with what training does.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._under_way: Background[Saved] | None = None
        self._held_up = 0.0
        self._copies: dict[str, Tensor] = {}
        self._reserved: Background[None] | None = None
        self._mesh: DeviceMesh | None = None

    @property
    def failed(self) -> bool:
        """Whether the save under way has come to an error; :meth:`wait` raises it."""
        return self._under_way is not None and self._under_way.error is not None

    def reserve(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Begin to get the memory that copies of GPU tensors need, which takes seconds the first time."""
        if self.world.device.type != "cuda":
            return
        whole = dict(model.named_parameters()) if self.world.is_first else {}
        needed = {name: tensor.shape for name, tensor in whole.items()}
        needed |= {name: local_part(p).shape for name, p in remembered_parameters(model, optimizers).items()}

        def reserve() -> None:
            for name, shape in needed.items():
                self._copies[name] = torch.empty(shape, pin_memory=True)

        self._reserved = Background(reserve)

    def start(
        self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]
    ) -> None:
        """Copy all tensors and begin to write the checkpoint after ``step`` steps; the save before must be waited for."""
        started = time.perf_counter()
        if self._reserved is not None:
            self._reserved.result()
        copies = {name: self._whole(name, tensor) for name, tensor in model.state_dict().items()}
        memory = {name: self._part(name, tensor) for name, tensor in optimizer_tensors(model, optimizers).items()}
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        weights = {name: tensor for name, tensor in copies.items() if tensor is not None}
        memory_fingerprint = fingerprint(optimizer_tensors(model, optimizers), self.world)
        state = {**state, "step": step, "updates": count_updates(optimizers), "optimizer": memory_fingerprint}
        self._held_up = time.perf_counter() - started
        self._under_way = Background(lambda: self._write(step, weights, memory, state, started))
        self._step = step

    def resume(self, path: Path) -> None:
        """Take a committed checkpoint for the save under way: :meth:`wait` returns it."""
        manifest = read_manifest(path, CHECKPOINT_FORMAT)
        saved = Saved(path, manifest["step"], _digests(manifest, read_state(path)), 0.0, 0.0)
        self._under_way, self._held_up = Background(lambda: saved), 0.0

    def wait(self) -> Saved | None:
        """Wait until the save under way is committed and return it; None when none is.

        Raises:
            UsageError: the disk is full or cannot be written; nothing that was committed is touched.
        """
        if self._under_way is None:
            return None
        started, under_way, self._under_way = time.perf_counter(), self._under_way, None
        while not under_way.ended(_PATIENCE):
            waited = time.perf_counter() - started
            self.on_note(
                f"{checkpoint_path(self.directory, self._step)}: training waits for its files, {waited:.0f} s so far"
            )
        saved = under_way.result()
        held_up = self._held_up + time.perf_counter() - started
        return Saved(saved.path, saved.step, saved.digests, saved.seconds, held_up)

    def close(self) -> None:
        """Wait for the save under way, which may yet be committed though the run has failed; but not for ever."""
        for thread in (self._reserved, self._under_way):
            if thread is not None:
                thread.ended(_LAST_PATIENCE)

    def _whole(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a copy of a weight, gathered from all processes, in the first of them."""
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return self._copied(name, tensor) if self.world.is_first else None

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of this process's part, which still knows its place in the whole."""
        if not isinstance(tensor, DTensor):
            return self._copied(name, tensor)
        mesh = tensor.device_mesh
        if self._mesh is None:
            on_cpu = mesh.device_type == "cpu"
            self._mesh = mesh if on_cpu else init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)
        part = self._copied(name, local_part(tensor))
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(part, self._mesh, tensor.placements, run_check=False, shape=shape, stride=stride)

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.detach().clone()
        return self._copies[name].copy_(tensor.detach(), non_blocking=True)

    def _write(
        self, step: int, weights: dict[str, Tensor], memory: dict[str, Tensor], state: dict[str, Any], started: float
    ) -> Saved:
        final, work = checkpoint_path(self.directory, step), work_path(self.directory, step)
        failure = ""
        digests: dict[str, str] = {}
        try:
            writer = _Writer(str(work / "optimizer"), save_distributed=True)
            save_distributed(memory, storage_writer=writer, process_group=self._group, no_dist=self.world.size == 1)
            if self.world.is_first:
                self.save_weights(work, weights)
                write_json(work / "state.json", state)
                digests = _digests(_commit(work, final, step), state)
                keep_newest(self.directory, step, self.keep, self.keep_every)
        except CheckpointException as error:
            failure = "; ".join(_reason(each) for each, _ in error.failures.values())
        except OSError as error:
            failure = _reason(error)
        finally:
            if self.world.is_first:
                shutil.rmtree(work, ignore_errors=True)
        self._agree(bool(failure))
        if failure:
            raise UsageError(f"{final}: cannot be written ({failure}); free space and run the same command again")
        return Saved(final, step, digests, time.perf_counter() - started, 0.0)

    def _agree(self, failed: bool) -> None:
        """Wait for all processes, and fail without a word where only another one knows why."""
        if self._group is None:
            return
        failures = torch.tensor([int(failed)])
        dist.all_reduce(failures, group=self._group)
        if int(failures) and not failed:
            raise UsageError("")


class _Writer(HuggingFaceStorageWriter):
    """Writes a process's part of the optimizer's memory as one file, without the copy of it that the original makes."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write the tensors of a plan, with their places in the whole where the reader looks for them."""
        tensors, places, results = {}, {}, []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor) or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn}: is no tensor, and safetensors files hold nothing else")
            tensors[item.index.fqn] = tensor
            places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(item.index, tensor.nbytes, None))
        if tensors:
            path = Path(self.path) / f"optimizer-{plan.storage_data['shard_index']:05d}.safetensors"
            save_tensors(path, tensors, {"DCP_SHARDING_INFO": json.dumps(places)})
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(results)
        return future


def _commit(work: Path, final: Path, step: int) -> dict[str, Any]:
    fsync_tree(work)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(work, final)
    fsync_directory(final.parent)
    return write_manifest(final, {"format": CHECKPOINT_FORMAT, "step": step})


def _digests(manifest: dict[str, Any], state: dict[str, Any]) -> dict[str, str]:
    weights = manifest["files"][f"model/{WEIGHTS_FILE}"]["sha256"]
    return {"weights_sha256": weights, "optimizer_fingerprint": state["optimizer"]}


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
