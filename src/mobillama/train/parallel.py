"""A model over several processes, applied from outside: DDP, FSDP2, and HSDP (FSDP2 within groups, copies between them).

With FSDP a layer's own parameters are a group that is gathered when the layer runs. What several layers share (MobiLlama's
feed-forward network, baseline3's whole block) belongs to the root's group, together with embedding, head and final norm: it
is gathered once a step and stays, and its gradient, which adds up over all uses in float32, is reduced once. A group of
its own would be gathered at each of its 22 uses, twice.
"""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mobillama.errors import UsageError
from mobillama.model.transformer import Decoder
from mobillama.train.objective import Objective
from mobillama.train.world import World


def distribute(objective: Objective, world: World, kind: str, shard_ranks: int = 0) -> nn.Module:
    """Return the module that all processes call together; gradients are means over them.

    Args:
        objective: on its device, with equal weights in all processes.
        world: the processes; alone, the objective is returned as it is.
        kind: ``ddp``, ``fsdp`` or ``hsdp``.
        shard_ranks: with hsdp, how many processes share one copy; 0: those of a machine.

    Raises:
        UsageError: hsdp's groups do not divide the processes.
    """
    if world.size == 1:
        return objective
    if kind == "ddp":
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids, gradient_as_bucket_view=True)
    shape: tuple[int, ...] = (world.size,)
    names: tuple[str, ...] = ("shard",)
    if kind == "hsdp":
        shard_ranks = shard_ranks or world.per_node
        if world.size % shard_ranks:
            raise UsageError(f"train.shard_ranks: {shard_ranks} does not divide the {world.size} processes")
        shape, names = (world.size // shard_ranks, shard_ranks), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    decoder = objective.model.model
    for layer, own in layer_groups(decoder):
        # FSDP takes a group's parameters from the module whose call gathers them, and a layer does not own its network.
        layer.add_module("own", own)
        fully_shard(layer, mesh=mesh)
        del layer.own
    sharded = {p for layer, own in layer_groups(decoder) for part in (layer, own) for p in part.parameters()}
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, ignored_params=sharded)
    return objective


def layer_groups(decoder: Decoder) -> list[tuple[nn.Module, nn.ModuleList]]:
    """Return each stored layer that is used once, with the feed-forward network that it alone uses, if there is one.

    Each is a group of FSDP's; all else is the root's.
    """
    uses_of_layer = Counter(layer for layer, _ in decoder.layer_weights)
    uses_of_ffn = Counter(ffn for _, ffn in decoder.layer_weights)
    return [
        (decoder.layers[layer], nn.ModuleList([decoder.ffns[ffn]] if uses_of_ffn[ffn] == 1 else []))
        for layer, ffn in decoder.layer_weights
        if uses_of_layer[layer] == 1
    ]


def keep_gradients_local(module: nn.Module, local: bool) -> None:
    """Let following backward passes add up gradients in this process (True), or reduce them over all of them (False)."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = not local
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not local)
        module.set_reshard_after_backward(not local, recurse=False)
