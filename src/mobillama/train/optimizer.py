"""The optimizers of a model's parameters, and the learning rate of each step (section 3.3 of the paper)."""

from __future__ import annotations

import math

import torch
from torch import nn

from mobillama.recipe import OptimizerConfig


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together hold every parameter once: AdamW, and with ``kind=muon`` Muon before it.

    Matrices decay, norms and the embedding table do not (unless ``decay_all``). Muon (Keller Jordan 2024; scaled to
    AdamW's updates as in arXiv 2502.16982, so that rates and decay carry over) takes the layers' matrices; embedding
    table, head and norms stay with AdamW.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
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
