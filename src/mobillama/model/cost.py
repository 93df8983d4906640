"""What a model costs: parameters, arithmetic, and bytes, computed from its shape alone.

Sharing lowers what is stored, not what is applied: a token passes the shared feed-forward network once per layer, and
every pass is counted. FLOPs are two per multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobillama.recipe import ModelConfig


@dataclass(frozen=True)
class Cost:
    """Costs of one model at one context length."""

    stored_parameters: int
    """Numbers in the weight file."""
    applied_parameters: int
    """Numbers of the unshared twin: what the same computation stores without sharing."""
    matmul_parameters: int
    """Multiply-adds a token makes with weights (embedding look-up and norms excluded, head included)."""
    attention_flops: int
    """FLOPs a token makes with keys and values in a forward pass, averaged over a causal context."""
    training_flops_full: int
    """FLOPs per trained token, forward and backward, attention counted over the whole context (the paper's way)."""
    training_flops_causal: int
    """The same with attention counted over the visible half of the context."""
    kv_cache_bytes_per_token: int
    """Bytes of keys and values that a token leaves in a 16-bit cache."""
    training_bytes: int
    """Float32 weights, gradients and the two AdamW moments: what a training step holds beside activations."""
    matmul_stored: int
    """Stored numbers that a generated token multiplies with (head included, embedding table excluded)."""

    def weight_bytes(self, bits: float = 16) -> int:
        """Bytes of the weights stored once at a width of ``bits`` each."""
        return round(self.stored_parameters * bits / 8)

    def generated_token_bytes(self, context: int, bits: float = 16) -> int:
        """Bytes that a generated token must read once: each stored matrix and the cache of ``context`` tokens.

        The bound is for a machine whose cache keeps the shared network between layers; without one the applied
        parameters count instead.
        """
        return round(self.matmul_stored * bits / 8) + context * self.kv_cache_bytes_per_token


def model_cost(config: ModelConfig, context: int | None = None) -> Cost:
    """Return the costs of ``config`` at ``context`` tokens (default: its full context).

    Stored parameters: P = 2·V·h (V·h if tied) + L_attn·(2·h·H·d + 2·h·K·d) + L_ffn·3·h·I + norms, with L_attn and L_ffn
    the numbers of stored blocks; training counts 6 FLOPs per applied multiply-add and 12·L·H·d·context for full attention.
    """
    tokens = context or config.max_position_embeddings
    width, layers = config.hidden_size, config.num_hidden_layers
    query_width = config.num_attention_heads * config.attention_head_dim
    key_width = config.key_value_heads * config.attention_head_dim
    attention = 2 * width * query_width + 2 * width * key_width
    ffn = 3 * width * config.intermediate_size
    table = config.vocab_size * width
    stored_layers = len({layer for layer, _ in config.layer_weights})
    stored_ffns = len({index for _, index in config.layer_weights})
    stored_matrices = stored_layers * attention + stored_ffns * ffn + table
    look_up = 0 if config.tie_word_embeddings else table
    norms = 2 * width + (2 * config.attention_head_dim if config.qk_norm else 0)
    stored = stored_matrices + look_up + stored_layers * norms + width
    applied = table + look_up + layers * (attention + ffn + norms) + width
    matmul = layers * (attention + ffn) + table
    attention_full = 4 * layers * query_width * tokens
    return Cost(
        stored_parameters=stored,
        applied_parameters=applied,
        matmul_parameters=matmul,
        attention_flops=attention_full // 2,
        training_flops_full=6 * matmul + 3 * attention_full,
        training_flops_causal=6 * matmul + 3 * attention_full // 2,
        kv_cache_bytes_per_token=2 * 2 * layers * key_width,
        training_bytes=16 * stored,
        matmul_stored=stored_matrices,
    )
