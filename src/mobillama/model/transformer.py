"""The one definition of the model: a Llama-style decoder whose layers may share their feed-forward network.

Section 3.2 of the paper: every layer has its own attention and its own two norms; ONE SwiGLU feed-forward network serves
all layers. large-base and baselines 1–3 are the same class with another ``share``. Parameter names are Llama's, but for
the feed-forward networks, which stand once each under ``model.ffns``.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, Optional

import torch
from torch import Tensor, nn

from mobillama.model.attention import Attention, AttentionCache, attention_mask
from mobillama.model.linear import Linear, multiply_gated, multiply_side_by_side, to_compute_type
from mobillama.model.norm import RMSNorm
from mobillama.model.rotary import rotary_tables
from mobillama.recipe import ModelConfig

if find_spec("triton"):
    import mobillama.model.kernels  # noqa: F401  (registers the operators that a GPU's tensors take)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, into_residual=True)

    def forward(self, x_btc: Tensor) -> Tensor:
        """Map (b, t, c) to (b, t, c)."""
        return multiply_gated(multiply_side_by_side(x_btc, self.gate_proj, self.up_proj), self.down_proj)


class Layer(nn.Module):
    """A layer's own part: attention and the two norms. Its feed-forward network is handed in, since it may be shared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x_btc: Tensor,
        ffn: FeedForward,
        rotary: tuple[Tensor, Tensor],
        mask: Optional[Tensor],
        is_causal: bool,
        cache: Optional[AttentionCache],
        layer: int,
    ) -> Tensor:
        """Pass the residual stream (b, t, c) through attention, then through ``ffn``."""
        x_btc = x_btc + self.self_attn(self.input_layernorm(x_btc), rotary, mask, is_causal, cache, layer)
        return x_btc + ffn(self.post_attention_layernorm(x_btc))


class Decoder(nn.Module):
    """Token embedding, L layers over the stored blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = config
        self.layer_weights = config.layer_weights
        stored_layers = 1 + max(block for block, _ in self.layer_weights)
        stored_ffns = 1 + max(ffn for _, ffn in self.layer_weights)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(stored_layers))
        self.ffns = nn.ModuleList(FeedForward(config) for _ in range(stored_ffns))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        *,
        inputs_embeds: Optional[Tensor] = None,
        attention_mask_bs: Optional[Tensor] = None,
        mask_b1ts: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        document_ids: Optional[Tensor] = None,
        cache: Optional[AttentionCache] = None,
    ) -> Tensor:
        """Return the final hidden states (b, t, c).

        Args:
            input_ids: (b, t) token ids; or give ``inputs_embeds`` (b, t, c).
            attention_mask_bs: (b, s) non-zero where a token is real, over cached and new tokens; padding may stand
                left or right.
            mask_b1ts: (b, 1, t, s) a mask of one's own as attention takes it, instead of the causal one; it goes with
                ``position_ids``.
            position_ids: (b, t) positions; absent: counted from the cache, or over real tokens, or within documents.
            document_ids: (b, t) document of each token of a packed sequence; documents do not see each other.
            cache: keys and values of earlier tokens; the new ones are appended.

        Raises:
            ValueError: ``document_ids`` together with a filled cache.
        """
        x_btc = to_compute_type(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        batch, new = x_btc.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if document_ids is not None and past:
            raise ValueError("document_ids describe a packed sequence; they cannot continue a cache")
        padding_bs = None if attention_mask_bs is None else attention_mask_bs.to(x_btc.device) != 0
        if padding_bs is not None and bool(padding_bs.all()):
            padding_bs = None
        if position_ids is None:
            position_ids = default_positions(batch, past, new, padding_bs, document_ids, x_btc.device)
        rotary = rotary_tables(position_ids, self.shape.attention_head_dim, self.shape.rope_theta)
        if mask_b1ts is None:
            mask, is_causal = attention_mask(new, past + new, padding_bs, document_ids, x_btc.device)
        else:
            mask, is_causal = mask_b1ts, False
        for index, (layer, ffn) in enumerate(self.layer_weights):
            x_btc = self.layers[layer](x_btc, self.ffns[ffn], rotary, mask, is_causal, cache, index)
        return self.norm(x_btc)


class MobiLlama(nn.Module):
    """The decoder with its head, which is a matrix of its own or the embedding table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            tie_head(self)

    def forward(
        self, input_ids: Optional[Tensor] = None, *, last_only: bool = False, **inputs: Optional[Tensor]
    ) -> Tensor:
        """Return logits (b, t, vocabulary), or (b, 1, vocabulary) of the last token; ``inputs`` are the decoder's."""
        hidden_btc = self.model(input_ids, **inputs)
        return self.lm_head(hidden_btc[:, -1:] if last_only else hidden_btc)


def tie_head(model: nn.Module) -> None:
    """Make the head's matrix and the embedding table one parameter, which a state dict holds once, as the table."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"

    def tie(module: Any, *unused: object) -> None:
        module.lm_head.weight = module.model.embed_tokens.weight

    def leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: object) -> None:
        state.pop(prefix + head, None)

    def fill_in(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: object) -> None:
        if prefix + table in state:
            state[prefix + head] = state[prefix + table]

    tie(model)
    hooks: Any = model  # torch types them not
    hooks.register_state_dict_post_hook(leave_out)
    hooks.register_load_state_dict_pre_hook(fill_in)
    hooks.register_load_state_dict_post_hook(tie)  # what is assigned to two names comes apart


def default_positions(
    batch: int,
    past: int,
    new: int,
    padding_bs: Optional[Tensor],
    documents_bt: Optional[Tensor],
    device: torch.device,
) -> Tensor:
    """Return positions (b or 1, t): a row's real tokens count from 0, and so do the tokens of each packed document."""
    if padding_bs is not None:
        return (padding_bs.cumsum(1) - 1).clamp(min=0)[:, past : past + new]
    index = torch.arange(past, past + new, device=device)[None]
    if documents_bt is None:
        return index
    starts = torch.ones_like(documents_bt, dtype=torch.bool)
    starts[:, 1:] = documents_bt[:, 1:] != documents_bt[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw all weights anew: the same bits on every device and whatever came before."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        initialise_module(module, config, generator)


@torch.no_grad()
def initialise_module(module: nn.Module, config: ModelConfig, generator: Optional[torch.Generator] = None) -> None:
    """Draw a matrix from N(0, initializer_range), set a norm to 1; leave other modules alone.

    With ``scale_residual_init`` the projections back into the residual stream start smaller by sqrt(2 L).
    """
    if isinstance(module, nn.RMSNorm):
        module.weight.fill_(1.0)
    elif isinstance(module, nn.Linear | nn.Embedding):
        std = config.initializer_range
        if config.scale_residual_init and getattr(module, "into_residual", False):
            std /= math.sqrt(2 * config.num_hidden_layers)
        module.weight.copy_(torch.empty(module.weight.shape).normal_(0.0, std, generator=generator))
