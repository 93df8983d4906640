"""Low-rank adapters on a model's matrices (LoRA, arXiv 2106.09685), made by peft and stored in its format.

A matrix W becomes W + (alpha/rank) · B A with W frozen. What layers share stands once in the model, and so does its adapter:
one pair B, A serves all uses of the shared feed-forward network, and the merged model shares it as before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.directory import save_tensors
from mobillama.model.linear import Linear
from mobillama.tune.recipe import LoraConfig

ADAPTER_DIRECTORY = "adapter"
_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of peft's names, before those of the transformers class
_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "ffn": ["gate_proj", "up_proj", "down_proj"],
}
_TARGETS["all"] = [*_TARGETS["attention"], *_TARGETS["ffn"]]


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a model and put adapters into it, which at first change nothing: B is 0, A is drawn from ``seed``."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_settings(config), model)
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        for part in (layer.lora_A, layer.lora_B):
            for name, linear in part.items():
                assert isinstance(linear, nn.Linear)
                part[name] = _counted_in_float32(linear)


def adapter_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' tensors of a state dict by peft's names in a file."""
    return {_PREFIX + name.replace(".default.", "."): tensor for name, tensor in tensors.items() if ".lora_" in name}


def merged(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return the state dict of the model without adapters that computes the same."""
    weights = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name:
            a_ri, b_or = (tensors[name.replace("base_layer", f"lora_{part}.default")] for part in "AB")
            tensor = torch.addmm(tensor, b_or, a_ri, alpha=config.alpha / config.rank)
        weights[plain] = tensor
    return weights


def save_adapters(directory: Path, tensors: dict[str, Tensor], config: LoraConfig, base: str) -> None:
    """Write the adapters of a state dict as peft does; ``base`` names the model they belong to."""
    directory.mkdir()
    settings = _settings(config)
    settings.base_model_name_or_path = base
    settings.save_pretrained(str(directory))
    save_tensors(directory / _FILE, adapter_tensors(tensors))


def _settings(config: LoraConfig) -> Any:
    from peft import LoraConfig as Settings

    return Settings(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=_TARGETS[config.targets],
        bias="none",
        task_type="CAUSAL_LM",
    )


def _counted_in_float32(linear: nn.Linear) -> Linear:
    """Return a matrix of peft's as one of ours, whose gradient adds up in float32 over all uses of a shared adapter."""
    ours = Linear(linear.in_features, linear.out_features)
    ours.weight = linear.weight
    return ours
