"""The unshared twin: the same function as a plain Llama that stores the shared weights once per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from mobillama.recipe import ModelConfig


def unshare_weights(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return Llama's state dict: ``model.ffns.G.*`` copied to ``model.layers.I.mlp.*`` of every layer I that uses it."""
    twin = {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    twin["lm_head.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for index, (layer, ffn) in enumerate(config.layer_weights):
        for ours, theirs in ((f"model.layers.{layer}.", ""), (f"model.ffns.{ffn}.", "mlp.")):
            part = {name.removeprefix(ours): tensor for name, tensor in weights.items() if name.startswith(ours)}
            twin |= {f"model.layers.{index}.{theirs}{name}": tensor for name, tensor in part.items()}
    return twin


def unshare(weights: dict[str, Tensor], config: ModelConfig) -> PreTrainedModel:
    """Return stock ``LlamaForCausalLM`` with the weights of a MobiLlama state dict; its logits are equal.

    With QK-norm it is stock ``Qwen3ForCausalLM``, a Llama that has it too.
    """
    dtype = weights["model.embed_tokens.weight"].dtype
    twin = AutoModelForCausalLM.from_config(stock_config(config), dtype=dtype)
    with torch.no_grad():
        twin.load_state_dict(unshare_weights(weights, config))
    return twin.eval()


def stock_config(config: ModelConfig) -> Any:
    """Return the config of the stock model that computes the same, layer by layer, with nothing shared."""
    settings: Any = Qwen3Config if config.qk_norm else LlamaConfig
    return settings(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.attention_head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=False,
        mlp_bias=False,
    )
