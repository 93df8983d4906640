"""The transformers class: the one decoder, wrapped so that generate, Trainer and save_pretrained work with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mobillama.directory import STUB, STUB_FILE
from mobillama.hf.configuration import MobiLlamaConfig
from mobillama.model.linear import Linear
from mobillama.model.loss import IGNORE, token_losses
from mobillama.model.transformer import Decoder, initialise_module
from mobillama.record.files import write_text


class MobiLlamaDecoder(Decoder):
    """The decoder with the inputs and the output of a transformers model."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        document_ids: Optional[Tensor] = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states (b, t, c) and the cache; see :meth:`MobiLlamaForCausalLM.forward`."""
        if use_cache is None:
            use_cache = not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        whole = attention_mask is not None and attention_mask.dim() == 4
        hidden_btc = super().forward(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask_bs=None if whole else attention_mask,
            mask_b1ts=attention_mask if whole else None,
            position_ids=position_ids,
            document_ids=document_ids,
            cache=past_key_values,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_btc, past_key_values=past_key_values)


class MobiLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    """MobiLlama with its head. Weights have the same names as in :class:`mobillama.model.transformer.MobiLlama`."""

    config_class = MobiLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012 transformers declares it so
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, config: MobiLlamaConfig) -> None:
        super().__init__(config)
        shape = config.shape
        self.model = MobiLlamaDecoder(shape)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Optional[Tensor] = None,
        num_items_in_batch: Optional[Tensor | int] = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (b, t, vocabulary), the cache, and with ``labels`` (b, t; -100 ignored) the mean loss.

        Args:
            input_ids: (b, t); or ``inputs_embeds`` (b, t, c).
            attention_mask: (b, s), non-zero where a token is real, padding left or right; or the whole mask (b, 1, t, s),
                which goes with ``position_ids``.
            position_ids: (b, t) positions.
            past_key_values: a transformers cache.
            use_cache: return a cache (default outside training).
            logits_to_keep: compute logits only of the last n tokens, or at the given indices.
            document_ids: (b, t) document of each packed token.
            num_items_in_batch: what the loss is divided by instead of its own count (gradient accumulation).
        """
        if self.gradient_checkpointing and self.training:
            use_cache = False  # layers that are computed again would fill it twice
        found = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, document_ids
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_btv = self.lm_head(found.last_hidden_state[:, keep])
        loss = None if labels is None else _mean_loss(logits_btv, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits_btv, past_key_values=found.past_key_values)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Let every n-th layer keep its input alone and compute the rest again for the backward pass."""
        self.gradient_checkpointing = enable
        for number, layer in enumerate(self.model.layers):
            vars(layer).pop("forward", None)
            if enable and number % every_n_layers == 0:
                layer.forward = functools.partial(gradient_checkpointing_func, layer.forward)

    def _init_weights(self, module: nn.Module) -> None:
        initialise_module(module, self.config.shape)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Save as transformers does, with the stub that lets stock tools load the directory."""
        super().save_pretrained(save_directory, *args, **options)
        write_text(Path(save_directory) / STUB_FILE, STUB)


def _mean_loss(logits_btv: Tensor, labels_bt: Tensor, count: Optional[Tensor | int]) -> Tensor:
    targets_bt = labels_bt[:, 1:].to(logits_btv.device)
    total = token_losses(logits_btv[:, :-1], targets_bt).sum()
    if count is not None:
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)
    return total / (targets_bt != IGNORE).sum().clamp(min=1)
