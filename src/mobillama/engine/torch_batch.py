"""Several sequences decoded together with torch: one pass over the weights gives each its next token.

The keys and values of slots are rows of one cache. Sequences that decode together stand in its first rows, so a step reads
them where they lie; a row is moved only when another set of sequences decodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobillama.engine.interface import Memory, check_work
from mobillama.engine.torch_engine import new_cache
from mobillama.model.transformer import MobiLlama


class TorchBatchEngine:
    """Decodes the sequences of several slots.

    Logits are those of :class:`mobillama.engine.torch_engine.TorchEngine` but for the order in which a product of several
    rows adds up: relative differences of 1e-5 in float32. A sequence fed alone gives the same bits.

    Args:
        model: in evaluation mode.
        slots: sequences held at once.
        context_length: tokens that a slot holds; absent: what the model was made for.

    Raises:
        UsageError: the context does not fit the memory.
    """

    name = "torch"

    def __init__(self, model: MobiLlama, slots: int, context_length: int | None = None) -> None:
        shape, weight = model.model.shape, model.lm_head.weight
        self._model, self._device, self.slots = model, weight.device, slots
        self.context_length = context_length or shape.max_position_embeddings
        self.vocab_size = shape.vocab_size
        cache = new_cache(model, slots, self.context_length)
        self._keys_lbhsd, self._values_lbhsd = cache.tensors(self.context_length)
        self._lengths, self._row_of = [0] * slots, list(range(slots))
        sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}  # what is shared or tied comes once
        looked_up = 0 if shape.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        weights = sum(sizes.values())
        self.memory = Memory(weights, weights - looked_up, cache.nbytes)

    def length(self, slot: int) -> int:
        """Return the number of tokens that a slot has taken in."""
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Forget all tokens of a slot from position ``length`` on."""
        self._lengths[slot] = min(length, self._lengths[slot])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Make a slot hold the first ``length`` tokens of another."""
        here, there = self._row_of[source], self._row_of[target]
        self._lengths[target] = kept = min(length, self._lengths[source])
        for tensor_lbhsd in (self._keys_lbhsd, self._values_lbhsd):
            tensor_lbhsd[:, there, :, :kept] = tensor_lbhsd[:, here, :, :kept]

    @torch.inference_mode()
    def feed(self, work: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.float32]:
        """Take in tokens; return the logits that follow: see :meth:`mobillama.engine.interface.BatchEngine.feed`.

        Single tokens are one pass, each longer stretch is one of its own.

        Raises:
            ValueError: see there.
        """
        check_work(work, self)
        logits_wv = np.empty((len(work), self.vocab_size), np.float32)
        single = [place for place, (_, ids) in enumerate(work) if len(ids) == 1]
        if len(single) > 1:
            logits_wv[single] = self._step([(work[place][0], work[place][1][0]) for place in single])
        else:
            single = []
        for place in set(range(len(work))).difference(single):
            logits_wv[place] = self._stretch(*work[place])
        return logits_wv

    def _stretch(self, slot: int, ids: Sequence[int]) -> NDArray[np.float32]:
        row, held = self._row_of[slot], self._lengths[slot]
        cache = _Stretch(self._keys_lbhsd[:, row : row + 1], self._values_lbhsd[:, row : row + 1], held)
        logits_1tv = self._model(torch.tensor([list(ids)], device=self._device), cache=cache, last_only=True)
        self._lengths[slot] = held + len(ids)
        return logits_1tv[0, 0].float().cpu().numpy()

    def _step(self, tokens: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """Decode one token of several slots; return their logits (slots, vocabulary) in the order given."""
        self._bring_to_front([slot for slot, _ in tokens])
        by_row = sorted(tokens, key=lambda pair: self._row_of[pair[0]])
        held = [self._lengths[slot] for slot, _ in by_row]
        token_b1 = torch.tensor([[token] for _, token in by_row], device=self._device)
        position_b1 = torch.tensor(held, device=self._device)[:, None]
        rows, span = len(by_row), max(held) + 1
        mask_b1ts = (torch.arange(span, device=self._device) <= position_b1)[:, None, None]
        cache = _Step(self._keys_lbhsd[:, :rows, :, :span], self._values_lbhsd[:, :rows, :, :span], position_b1[:, 0])
        logits_b1v = self._model(token_b1, position_ids=position_b1, mask_b1ts=mask_b1ts, cache=cache, last_only=True)
        for slot, _ in by_row:
            self._lengths[slot] += 1
        return logits_b1v[[self._row_of[slot] for slot, _ in tokens], 0].float().cpu().numpy()

    def _bring_to_front(self, slots: Sequence[int]) -> None:
        """Move the rows of some slots to the front, each in exchange for a row that is not wanted there."""
        wanted = set(slots)
        slot_in = {row: slot for slot, row in enumerate(self._row_of)}
        places = (row for row in range(len(slots)) if slot_in[row] not in wanted)
        for slot in slots:
            if (row := self._row_of[slot]) >= len(slots):
                place = next(places)
                other = slot_in[place]
                span = max(self._lengths[slot], self._lengths[other])
                for tensor in (self._keys_lbhsd, self._values_lbhsd):
                    here, there = tensor[:, place, :, :span], tensor[:, row, :, :span]
                    kept = here.clone()
                    here.copy_(there)
                    there.copy_(kept)
                self._row_of[slot], self._row_of[other] = place, row


class _Stretch:
    """The cache of one row, as attention asks for it."""

    def __init__(self, keys_lbhsd: Tensor, values_lbhsd: Tensor, held: int) -> None:
        self._keys_lbhsd, self._values_lbhsd, self._held = keys_lbhsd, values_lbhsd, held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens held before the stretch."""
        return self._held

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write the stretch after what is held; return all of it."""
        end = self._held + key_states.shape[2]
        keys_bhsd, values_bhsd = self._keys_lbhsd[layer_idx, :, :, :end], self._values_lbhsd[layer_idx, :, :, :end]
        keys_bhsd[:, :, self._held :] = key_states
        values_bhsd[:, :, self._held :] = value_states
        return keys_bhsd, values_bhsd


class _Step:
    """The cache of rows that each take one token, at positions of their own; what each holds is told by the mask."""

    def __init__(self, keys_lbhsd: Tensor, values_lbhsd: Tensor, position_b: Tensor) -> None:
        self._keys_lbhsd, self._values_lbhsd, self._position_b = keys_lbhsd, values_lbhsd, position_b
        self._row_b = torch.arange(len(position_b), device=position_b.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: see the class."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write each row's token at its position; return all places."""
        keys_bhsd, values_bhsd = self._keys_lbhsd[layer_idx], self._values_lbhsd[layer_idx]
        keys_bhsd[self._row_b, :, self._position_b] = key_states[:, :, 0]
        values_bhsd[self._row_b, :, self._position_b] = value_states[:, :, 0]
        return keys_bhsd, values_bhsd
