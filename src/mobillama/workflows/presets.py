"""The presets as a table: what each stores, applies, computes and needs."""

from __future__ import annotations

from typing import Any

from mobillama.console import note, table
from mobillama.model.cost import model_cost
from mobillama.recipe import PRESETS


def preset_rows() -> list[dict[str, Any]]:
    """Return the shape and cost of every preset, as ``mobillama presets --json`` prints them."""
    rows = []
    for name, (config, about) in PRESETS.items():
        cost = model_cost(config)
        context = config.max_position_embeddings
        rows.append(
            {
                "name": name,
                "about": about,
                "share": config.share,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_hidden_layers,
                "num_attention_heads": config.num_attention_heads,
                "head_dim": config.attention_head_dim,
                "vocab_size": config.vocab_size,
                "context": context,
                "stored_parameters": cost.stored_parameters,
                "applied_parameters": cost.applied_parameters,
                "training_flops_per_token_full": cost.training_flops_full,
                "training_flops_per_token_causal": cost.training_flops_causal,
                "weight_bytes_bf16": cost.weight_bytes(16),
                "weight_bytes_4bit": cost.weight_bytes(4.5),
                "kv_cache_bytes_16bit": cost.kv_cache_bytes_per_token * context,
                "training_bytes_without_activations": cost.training_bytes,
                "bytes_per_generated_token_bf16": cost.generated_token_bytes(context),
            }
        )
    return rows


def show_presets() -> None:
    """Print the presets for people."""
    rows = [
        (
            row["name"],
            f"{row['hidden_size']}/{row['intermediate_size']}/{row['num_hidden_layers']}",
            f"{row['num_attention_heads']}×{row['head_dim']}",
            row["share"],
            f"{row['stored_parameters']:,}",
            f"{row['applied_parameters']:,}",
            f"{row['training_flops_per_token_causal'] / 1e9:.2f}",
            f"{row['weight_bytes_bf16'] / 1e9:.2f}",
            f"{row['weight_bytes_4bit'] / 1e9:.2f}",
            f"{row['kv_cache_bytes_16bit'] / 1e6:.0f}",
            f"{row['training_bytes_without_activations'] / 1e9:.1f}",
        )
        for row in preset_rows()
    ]
    columns = ["preset", "h/I/L", "heads", "shares", "stored", "applied", "GFLOP/token"]
    columns += ["GB bf16", "GB 4-bit", "MB KV", "GB to train"]
    table("Model presets", columns, rows)
    note("stored: parameters in the file · applied: of the unshared twin, which computes the same")
    note(
        "GFLOP/token: forward and backward, causal attention · 4-bit: 4.5 bits a weight · KV: a full context in 16 bits"
    )
    note("GB to train: float32 weights, gradients and AdamW moments, without activations")
    for name, (_, about) in PRESETS.items():
        note(f"  {name}: {about}")
