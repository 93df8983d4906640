"""The optimizers of a model's parameters, and the learning rate of each step (section 3.3 of the paper)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mobillama.recipe import OptimizerConfig


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together hold every parameter to train: AdamW, and with ``kind=muon`` Muon before it.

    Matrices decay, norms and the embedding table do not (unless ``decay_all``). Muon (Keller Jordan 2024; scaled to
    AdamW's updates as in arXiv 2502.16982, so that rates and decay carry over) takes the layers' matrices; embedding
    table, head and norms stay with AdamW.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        is_matrix = parameter.dim() >= 2 and "embed_tokens" not in name
        if config.kind == "muon" and is_matrix and "lm_head" not in name:
            matrices.append(parameter)
        else:
            (decayed if is_matrix or config.decay_all else free).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    if decayed or free:
        optimizers.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=betas,
                eps=config.eps,
                fused=True,
            )
        )
    return optimizers


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of a model's whole gradient, over all processes, in float64, ()."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()


def apply_gradient(
    optimizers: list[torch.optim.Optimizer], rate: float, is_good: Tensor, norm: Tensor, clip: float
) -> None:
    """Take a step of all optimizers unless the gradient is bad, and free the gradient.

    AdamW clips while it reads the gradient, and leaves a bad one out by itself, so that a GPU goes on with it before
    anyone here knows.

    Args:
        optimizers: of one model.
        rate: the learning rate.
        is_good: whether the gradient may be applied, ().
        norm: of the whole gradient, ().
        clip: the gradient is made smaller if its norm is above this.
    """
    excess = ((norm + 1e-6) / clip).clamp(min=1.0).float()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if isinstance(optimizer, torch.optim.AdamW):
            vars(optimizer).update(grad_scale=excess, found_inf=(~is_good).float())  # as torch's GradScaler tells it
            optimizer.step()
        elif is_good:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_div_(gradients, excess)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule to the minimum.

    The first step learns at peak/warmup_steps, not at 0 as in the authors' trainer; the last step at the minimum.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        share = min(1.0, (steps - 1 - step) / max(1, round(config.decay_share * steps)))
    else:
        progress = (step - config.warmup_steps + 1) / max(1, steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * share
