"""The training loss: next-token cross-entropy in float32, kept per token so that it can be summed by source."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mobillama.model.linear import add_weight_gradient, to_compute_type

IGNORE = -100

# Logits held at once, in numbers: on a CPU what stays in its cache, on a GPU what fills it.
_CPU_CHUNK = 1 << 22
_GPU_CHUNK = 1 << 28


def token_losses(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Return the cross-entropy in nats (b, t), computed in float32; 0 where the target is :data:`IGNORE`."""
    flat = logits_btv.flatten(0, 1).float()
    losses = F.cross_entropy(flat, targets_bt.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view_as(targets_bt)


def linear_cross_entropy(
    hidden_btc: Tensor, weight_vc: Tensor, targets_bt: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the summed next-token loss of a head, and each token's loss (b, t; detached), without all logits at once.

    The head's products, softmax and gradients are computed for some rows at a time while their logits are at hand; the
    backward pass only scales what the forward pass left. The head's gradient adds up in float32; a head that is not
    trained gets none.

    Args:
        hidden_btc: final hidden states.
        weight_vc: the head's weight, in any precision; products are computed in autocast's type where it is on.
        targets_bt: next token of each position; :data:`IGNORE` where there is none.
        z_loss: what is added to the sum, but to no token's loss: this times the square of each log-normaliser (PaLM,
            arXiv 2204.02311, section 5).
    """
    function: Any = _LinearCrossEntropy
    total, losses_bt = function.apply(to_compute_type(hidden_btc), weight_vc, targets_bt, z_loss)
    return total, losses_bt


def _chunk_losses(
    logits_nv: Tensor, targets_n1: Tensor, counted_n1: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's loss in float32, its z-loss, and the gradients for all logits but the target's, and for that."""
    logits = logits_nv.float()
    p_nv = logits.softmax(1)
    log_total_n1 = logits.amax(1, keepdim=True) - p_nv.amax(1, keepdim=True).log()
    losses_n1 = torch.where(counted_n1, log_total_n1 - logits.gather(1, targets_n1), 0.0)
    grad_of_target_n1 = torch.expm1(-losses_n1)
    if not z_loss:
        others_nv = p_nv.to(logits_nv.dtype).mul_(counted_n1)
        return losses_n1[:, 0], torch.zeros_like(losses_n1[:, 0]), others_nv, grad_of_target_n1.to(logits_nv.dtype)
    pull_n1 = 2 * z_loss * log_total_n1 * counted_n1
    others_nv = (p_nv * (counted_n1 + pull_n1)).to(logits_nv.dtype)
    grad_of_target_n1 = grad_of_target_n1 + pull_n1 * torch.exp(-losses_n1)
    penalties_n = (z_loss * log_total_n1.square() * counted_n1)[:, 0]
    return losses_n1[:, 0], penalties_n, others_nv, grad_of_target_n1.to(logits_nv.dtype)


# On a GPU these passes over the logits take longer than their products, unless all of them are one kernel.
_fused_chunk_losses = functools.cache(lambda: torch.compile(_chunk_losses, dynamic=False))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_btc: Tensor, weight_vc: Tensor, targets_bt: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        hidden_nc, targets_n = hidden_btc.flatten(0, 1), targets_bt.flatten()
        weight = weight_vc.to(hidden_nc.dtype)
        losses_n = torch.empty(len(targets_n), dtype=torch.float32, device=hidden_nc.device)
        penalties_n = torch.empty_like(losses_n)
        grad_hidden_nc = torch.empty_like(hidden_nc)
        is_trained = ctx.needs_input_grad[1]
        dtype = torch.promote_types(weight_vc.dtype, torch.float32)
        grad_weight_vc = torch.zeros_like(weight_vc, dtype=dtype) if is_trained else None
        parts = -(-len(targets_n) * len(weight) // (_GPU_CHUNK if hidden_nc.is_cuda else _CPU_CHUNK))
        rows = -(-len(targets_n) // parts)
        chunk_losses = _fused_chunk_losses() if hidden_nc.is_cuda else _chunk_losses
        counted_n, targets_n = targets_n != IGNORE, targets_n.clamp(min=0)
        for start in range(0, len(targets_n), rows):
            part = slice(start, start + rows)
            targets, counted = targets_n[part, None], counted_n[part, None]
            logits = hidden_nc[part] @ weight.T
            losses_n[part], penalties_n[part], grad, grad_of_target = chunk_losses(logits, targets, counted, z_loss)
            grad.scatter_(1, targets, grad_of_target)
            grad_hidden_nc[part] = grad @ weight
            if is_trained:
                grad_weight_vc = add_weight_gradient(grad_weight_vc, grad, hidden_nc[part])
        kept = None if grad_weight_vc is None else grad_weight_vc.to(weight_vc.dtype)
        ctx.save_for_backward(grad_hidden_nc.view_as(hidden_btc), kept)
        losses_bt = losses_n.view_as(targets_bt)
        ctx.mark_non_differentiable(losses_bt)
        return losses_n.sum() + penalties_n.sum(), losses_bt

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden_btc, grad_weight_vc = ctx.saved_tensors
        grad_weight_vc = None if grad_weight_vc is None else grad_weight_vc * grad_total
        return grad_hidden_btc * grad_total.to(grad_hidden_btc.dtype), grad_weight_vc, None, None
