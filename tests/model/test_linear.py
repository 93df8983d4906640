"""The shared network's gradient adds up in float32, whatever the compute type."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mobillama.model import linear
from mobillama.model.loss import token_losses
from mobillama.model.swiglu import swiglu
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

LAYERS = 22
SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 32}


def gradients(model: nn.Module, autocast: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids[:, :-1])
    token_losses(logits, ids[:, 1:]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "ffns" in name}


def model_of(share: str) -> MobiLlama:
    config = ModelConfig(**SHAPE, share=share)
    model = MobiLlama(config)
    initialise(model, config, 0)
    return model


def relative_error(name: str, shared: dict[str, torch.Tensor]) -> float:
    """Error of a shared gradient against the float64 sum of the gradients of 22 separate, equal networks."""
    twin = model_of("none")
    once = model_of("ffn").state_dict()
    twin.load_state_dict(
        {n: once[n.replace(".ffns." + n.split(".")[2], ".ffns.0") if ".ffns." in n else n] for n in twin.state_dict()}
    )
    separate = gradients(twin, autocast=True)
    exact = sum(separate[f"model.ffns.{i}.{name}"].double() for i in range(LAYERS))
    return float((shared[f"model.ffns.0.{name}"].double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"])
def test_float32_weight_under_bfloat16_autocast_adds_in_float32(name):
    assert relative_error(name, gradients(model_of("ffn"), autocast=True)) < 1e-6


def test_the_measure_tells_autocasts_weight_cache_and_a_bfloat16_parameter_apart(monkeypatch):
    cast_per_use = relative_error("down_proj.weight", gradients(model_of("ffn"), autocast=True))
    monkeypatch.setattr(linear, "_multiply", lambda x, w, _, gated: F.linear(swiglu(x) if gated else x, w))
    cached = relative_error("down_proj.weight", gradients(model_of("ffn"), autocast=True))
    in_bfloat16 = relative_error("down_proj.weight", gradients(model_of("ffn").bfloat16(), autocast=False))
    assert cached > 1000 * cast_per_use
    assert in_bfloat16 > 1000 * cast_per_use
