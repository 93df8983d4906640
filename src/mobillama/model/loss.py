"""The training loss: next-token cross-entropy in float32, kept per token so that it can be summed by source."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mobillama.model.linear import to_compute_type

IGNORE = -100

# Logits held at once, in numbers: on a CPU what stays in its cache, on a GPU what fills it.
_CPU_CHUNK = 1 << 22
_GPU_CHUNK = 1 << 27


def token_losses(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Return the cross-entropy in nats (b, t), computed in float32; 0 where the target is :data:`IGNORE`."""
    flat = logits_btv.flatten(0, 1).float()
    losses = F.cross_entropy(flat, targets_bt.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view_as(targets_bt)


def linear_cross_entropy(hidden_btc: Tensor, weight_vc: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed next-token loss of a head, and each token's loss (b, t; detached), without all logits at once.

    The head's products, softmax and gradients are computed for some rows at a time while their logits are at hand; the
    backward pass only scales what the forward pass left. The head's gradient adds up in float32.

    Args:
        hidden_btc: final hidden states.
        weight_vc: the head's weight, in any precision; products are computed in autocast's type where it is on.
        targets_bt: next token of each position; :data:`IGNORE` where there is none.
    """
    function: Any = _LinearCrossEntropy
    total, losses_bt = function.apply(to_compute_type(hidden_btc), weight_vc, targets_bt)
    return total, losses_bt


def _chunk_losses(logits_nv: Tensor, targets_n1: Tensor, counted_n1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's loss in float32, its gradient for the logits as if none were the target, and for the target's."""
    logits = logits_nv.float()
    p_nv = logits.softmax(1)
    log_total_n1 = logits.amax(1, keepdim=True) - p_nv.amax(1, keepdim=True).log()
    losses_n1 = torch.where(counted_n1, log_total_n1 - logits.gather(1, targets_n1), 0.0)
    return losses_n1[:, 0], p_nv.to(logits_nv.dtype).mul_(counted_n1), torch.expm1(-losses_n1).to(logits_nv.dtype)


# On a GPU these passes over the logits take longer than their products, unless all of them are one kernel.
_fused_chunk_losses = functools.cache(lambda: torch.compile(_chunk_losses, dynamic=False))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_btc: Tensor, weight_vc: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
        hidden_nc, targets_n = hidden_btc.flatten(0, 1), targets_bt.flatten()
        weight = weight_vc.to(hidden_nc.dtype)
        losses_n = torch.empty(len(targets_n), dtype=torch.float32, device=hidden_nc.device)
        grad_hidden_nc = torch.empty_like(hidden_nc)
        grad_weight_vc = torch.zeros_like(weight_vc, dtype=torch.float32)
        parts = -(-len(targets_n) * len(weight) // (_GPU_CHUNK if hidden_nc.is_cuda else _CPU_CHUNK))
        rows = -(-len(targets_n) // parts)
        chunk_losses = _fused_chunk_losses() if hidden_nc.is_cuda else _chunk_losses
        counted_n, targets_n = targets_n != IGNORE, targets_n.clamp(min=0)
        for start in range(0, len(targets_n), rows):
            part = slice(start, start + rows)
            targets, counted = targets_n[part, None], counted_n[part, None]
            losses_n[part], grad, grad_of_target = chunk_losses(hidden_nc[part] @ weight.T, targets, counted)
            grad.scatter_(1, targets, grad_of_target)
            grad_hidden_nc[part] = grad @ weight
            grad_weight_vc += grad.T @ hidden_nc[part]
        ctx.save_for_backward(grad_hidden_nc.view_as(hidden_btc), grad_weight_vc.to(weight_vc.dtype))
        losses_bt = losses_n.view_as(targets_bt)
        ctx.mark_non_differentiable(losses_bt)
        return losses_n.sum(), losses_bt

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden_btc, grad_weight_vc = ctx.saved_tensors
        return grad_hidden_btc * grad_total.to(grad_hidden_btc.dtype), grad_weight_vc * grad_total, None
