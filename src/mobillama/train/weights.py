"""Looks at tensors in training: a fingerprint of their bits, and how far an update moves the weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mobillama.train.world import World

GROUPS = ("embedding", "attention", "feed-forward", "norms", "head")
_BLOCK = 1 << 24  # numbers at once
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_OTHER = 0xBF58476D1CE4E5B9 - (1 << 64)


def fingerprint(tensors: dict[str, Tensor], world: World) -> str:
    """Return 64 bits in hexadecimal that depend on every bit of float32 tensors, on their names and places.

    Each number's 32 bits are multiplied by an odd number drawn from its tensor's name and its place, and added modulo
    2^64: the sum is the same however tensors are divided among processes. It tells runs apart where they part; it
    withstands accidents, not attacks (a checkpoint's sha256 does).
    """
    total = torch.zeros((), dtype=torch.int64, device=world.device)
    for name, tensor in tensors.items():
        part, first = own_part(tensor.detach(), world)
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") + first
        bits = part.flatten().view(torch.int32)
        for offset in range(0, len(bits), _BLOCK):
            block = bits[offset : offset + _BLOCK].to(torch.int64)
            place = torch.arange(start + offset, start + offset + len(block), device=world.device) * _ODD
            total += (block * ((place ^ (place >> 29)) * _OTHER | 1)).sum()
    return f"{int(world.sum(total)) % (1 << 64):016x}"


class Movement:
    """Measures an update: made before it, asked after it."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self._parts = [(group_of(name), own_part(p.detach(), world)[0]) for name, p in model.named_parameters()]
        self._before = [part.clone() for _, part in self._parts]

    def ratios(self) -> dict[str, float]:
        """Return, for each of :data:`GROUPS`, the norm of what was added to its weights over the norm they had."""
        squares = torch.zeros(2, len(GROUPS), dtype=torch.float64, device=self.world.device)
        for (group, part), before in zip(self._parts, self._before, strict=True):
            squares[0, GROUPS.index(group)] += (part - before).square().sum()
            squares[1, GROUPS.index(group)] += before.square().sum()
        moved, had = self.world.sum(squares).tolist()
        return {name: math.sqrt(m / h) for name, m, h in zip(GROUPS, moved, had, strict=True) if h}


def group_of(name: str) -> str:
    """Return which of :data:`GROUPS` a parameter belongs to."""
    if "norm" in name:
        return "norms"
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    return "attention" if "self_attn" in name else "feed-forward"


def own_part(tensor: Tensor, world: World) -> tuple[Tensor, int]:
    """Return the part of a parameter that this process answers for, and where it starts in the flat whole.

    Every number belongs to exactly one process; of equal copies, the first process's counts.
    """
    if not isinstance(tensor, DTensor):
        return (tensor if world.is_first else tensor.flatten()[:0]), 0
    part, mesh = local_part(tensor), tensor.device_mesh
    *copy, shard = mesh.get_coordinate() or [0]
    rows = -(-tensor.shape[0] // mesh.shape[-1])  # as torch.chunk divides them
    return (part.flatten()[:0] if any(copy) else part), shard * rows * math.prod(tensor.shape[1:])


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
