"""The reference engine: the model itself in torch, with a key/value cache allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mobillama.directory import load_model
from mobillama.model.attention import KVCache
from mobillama.model.transformer import MobiLlama


class TorchEngine:
    """Decodes one sequence with torch.

    Args:
        model: in evaluation mode; see :meth:`from_directory`.
    """

    def __init__(self, model: MobiLlama) -> None:
        self._model = model
        config = model.model.shape
        weight = model.lm_head.weight
        self.context_length = config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self._device = weight.device
        self._cache = KVCache(config, 1, self.context_length, weight.dtype, weight.device)

    @classmethod
    def from_directory(cls, directory: Path, device: torch.device | str = "cpu") -> TorchEngine:
        """Load a model directory, weights as stored.

        Raises:
            UsageError: this is no model directory.
            CorruptDataError: it is damaged.
        """
        return cls(load_model(directory, device=device))

    @property
    def length(self) -> int:
        """Number of tokens taken in."""
        return self._cache.get_seq_length()

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens; return the logits (vocabulary,) that follow the last one.

        Raises:
            ValueError: no tokens, or more than ``context_length`` in all.
        """
        if not ids:
            raise ValueError("an engine is fed at least one token")
        input_ids = torch.tensor([list(ids)], device=self._device)
        logits = self._model(input_ids, cache=self._cache, last_only=True)
        return logits[0, -1].float().cpu().numpy()

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self._cache.truncate(length)
