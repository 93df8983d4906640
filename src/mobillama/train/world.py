"""The processes that train together: who this one is, and what all of them agree on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mobillama import errors
from mobillama.errors import MobiLlamaError, UsageError
from mobillama.train.device import choose_device

Value = TypeVar("Value")

_TIMEOUT = timedelta(minutes=10)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among those that train one model together; alone, all of its methods return what they are given."""

    rank: int
    """0…size-1."""
    size: int
    """Number of processes; each has a device of its own."""
    per_node: int
    """Number of them on this machine."""
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's records."""
        return self.rank == 0

    def share(self, what: Callable[[], Value]) -> Value:
        """Return what the first process's ``what()`` returns: something JSON holds.

        Raises:
            MobiLlamaError: ``what`` raised it; all processes do, and the first alone tells why.
        """
        if self.size == 1:
            return what()
        answer: dict[str, Any] = {}
        failure: MobiLlamaError | None = None
        if self.is_first:
            try:
                answer = {"value": what()}
            except MobiLlamaError as error:
                answer, failure = {"error": type(error).__name__}, error
        content = torch.frombuffer(bytearray(json.dumps(answer).encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        content = content if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0)
        if failure:
            raise failure
        answer = json.loads(bytes(content.tolist()))
        if "error" in answer:
            raise getattr(errors, answer["error"])("")
        return answer["value"]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of all processes' ``values``."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or stand alone; ``device`` is a recipe's.

    Raises:
        UsageError: torchrun's environment is incomplete, there are more processes than devices, or within the block the
            other processes have ended or do not answer for ten minutes; the first process alone tells so.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, 1, choose_device(device))
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun, or unset WORLD_SIZE")
    rank, size, local, per_node = (int(os.environ[name]) for name in _VARIABLES[:4])
    chosen = choose_device(device)
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise UsageError(f"device: under torchrun each process takes its own; set cuda or auto, not '{device}'")
        chosen = choose_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=_meeting_place(rank, size),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    try:
        yield World(rank, size, per_node, chosen)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]
        said = f"the other processes do not answer ({reason}); look at what the first of them to end has said"
        if rank and isinstance(error, dist.DistBackendError):
            raise UsageError(f"process {rank}: {reason}") from None  # it may be its own device that failed
        raise UsageError(f"{said}, and run the same command again" if rank == 0 else "") from None
    finally:
        dist.destroy_process_group()


def _meeting_place(rank: int, size: int) -> Store:
    """Return where the processes find each other.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone: each attempt has its own.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, size, is_master=rank == 0 and not agents, timeout=_TIMEOUT)
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
