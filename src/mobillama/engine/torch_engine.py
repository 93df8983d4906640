"""The reference engine: the model itself in torch, with a key/value cache allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobillama.engine.interface import Memory, check_tokens, does_not_fit
from mobillama.model.attention import KVCache
from mobillama.model.transformer import MobiLlama


class TorchEngine:
    """Decodes one sequence with torch. On a GPU a decoded token is one replay of a CUDA graph.

    Args:
        model: in evaluation mode.
        context_length: tokens to make room for; absent: what the model was made for.
        compile: let torch's compiler fuse the element-wise work of a step before it is captured (half a minute at start).

    Raises:
        UsageError: the context does not fit the memory.
    """

    name = "torch"

    def __init__(self, model: MobiLlama, context_length: int | None = None, compile: bool = False) -> None:
        self._model = model
        config = model.model.shape
        weight = model.lm_head.weight
        self.context_length = context_length or config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self._device = weight.device
        self._cache = new_cache(model, 1, self.context_length)
        sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}  # what is shared or tied comes once
        looked_up = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        weights = sum(sizes.values())
        self.memory = Memory(weights, weights - looked_up, self._cache.nbytes)
        self._step = _GraphStep(model, self._cache, compile) if weight.is_cuda else None

    @property
    def length(self) -> int:
        """Number of tokens taken in."""
        return self._cache.get_seq_length()

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens; return the logits (vocabulary,) that follow the last one.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than ``context_length`` in all.
        """
        check_tokens(ids, self)
        if len(ids) == 1 and self._step is not None:
            return self._step(ids[0])
        return self._forward(ids, last_only=True)[0]

    @torch.inference_mode()
    def feed_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens like :meth:`feed`; return the logits (tokens, vocabulary) that follow each."""
        check_tokens(ids, self)
        return self._forward(ids, last_only=False)

    def _forward(self, ids: Sequence[int], last_only: bool) -> NDArray[np.float32]:
        input_ids = torch.tensor([list(ids)], device=self._device)
        logits_btv = self._model(input_ids, cache=self._cache, last_only=last_only)
        return logits_btv[0].float().cpu().numpy()

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self._cache.truncate(length)


def new_cache(model: MobiLlama, rows: int, context_length: int) -> KVCache:
    """Return room for the keys and values of ``rows`` sequences, where the model's weights are.

    Raises:
        UsageError: it does not fit the memory.
    """
    weight = model.lm_head.weight
    try:
        return KVCache(model.model.shape, rows, context_length, weight.dtype, weight.device)
    except (OSError, OverflowError, MemoryError, RuntimeError):  # of mmap, and of torch on a GPU
        raise does_not_fit("torch engine", context_length) from None


class OneTokenStep:
    """One decoded token as a computation on fixed tensors, so that it can be captured once and replayed.

    Position and token are read from tensors, keys and values are written at the position, and attention looks at the
    first ``span`` places of the cache through a mask; nothing depends on a number that only Python knows.

    Args:
        model: in evaluation mode.
        cache: of one row.
        span: places of the cache that are looked at; the position must be below it.
    """

    def __init__(self, model: MobiLlama, cache: KVCache, span: int) -> None:
        self._model, self._keys_lbhsd, self._values_lbhsd = model, *cache.tensors(span)
        device = model.lm_head.weight.device
        self.token_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._places_s = torch.arange(span, device=device)

    def __call__(self) -> Tensor:
        """Return the float32 logits (vocabulary,) that follow the token."""
        mask_b1ts = (self._places_s <= self.position_11)[None, None]
        logits_btv = self._model(
            self.token_11, position_ids=self.position_11, mask_b1ts=mask_b1ts, cache=self, last_only=True
        )
        return logits_btv[0, 0].float()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: what is held is told by the mask."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write the token's key and value at its position; return all places of a layer."""
        keys_bhsd, values_bhsd = self._keys_lbhsd[layer_idx], self._values_lbhsd[layer_idx]
        keys_bhsd.index_copy_(2, self.position_11[0], key_states)
        values_bhsd.index_copy_(2, self.position_11[0], value_states)
        return keys_bhsd, values_bhsd


class _GraphStep:
    """Replays :class:`OneTokenStep` as CUDA graphs, one for each span of the cache: 256 places, 512, 1,024 and so on.

    A step on a graph costs one launch. Spans keep attention from reading the whole cache while little of it is filled.
    """

    FIRST_SPAN = 256

    def __init__(self, model: MobiLlama, cache: KVCache, compile: bool) -> None:
        self._model, self._cache, self._compile = model, cache, compile
        self._captured: dict[int, tuple[OneTokenStep, torch.cuda.CUDAGraph, Tensor]] = {}
        self._host_v = torch.empty(model.lm_head.out_features, pin_memory=True)

    def __call__(self, token: int) -> NDArray[np.float32]:
        position = self._cache.get_seq_length()
        span = self.FIRST_SPAN
        while span <= position:
            span *= 2
        span = min(span, self._cache.max_length)
        if span not in self._captured:
            self._captured[span] = self._capture(span)
        step, graph, logits_v = self._captured[span]
        step.token_11.fill_(token)
        step.position_11.fill_(position)
        graph.replay()
        self._host_v.copy_(logits_v, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        self._cache.extend(1)
        return self._host_v.numpy().copy()

    def _capture(self, span: int) -> tuple[OneTokenStep, torch.cuda.CUDAGraph, Tensor]:
        step = OneTokenStep(self._model, self._cache, span)
        compute = torch.compile(step.__call__, fullgraph=True) if self._compile else step
        # Runs before the capture write the same place as the first replay does, which overwrites it.
        step.position_11.fill_(self._cache.get_seq_length())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_v = compute()
        return step, graph, logits_v
