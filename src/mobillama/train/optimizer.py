"""AdamW in two groups, and the learning rate of each step (section 3.3 of the paper)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mobillama.recipe import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW; matrices decay, norms and the embedding table do not (unless ``decay_all``)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and "embed_tokens" not in name
        (decayed if is_matrix or config.decay_all else free).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then cosine to the minimum.

    The first step learns at peak/warmup_steps, not at 0 as in the authors' trainer; the last step at the minimum.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps + 1) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
