"""Decoding a GGUF file with the project's own kernels (:mod:`mobillama.native`). Imports no torch."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mobillama.engine.blocks import F16, Q8_0, TYPES, BlockType, decode
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import GGUFModel, read_model
from mobillama.engine.interface import Memory, check_work, chosen_context, does_not_fit
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError
from mobillama.native.build import CannotBuild
from mobillama.native.library import Layer, Run, Shape, kernels, library
from mobillama.record.environment import available_cores

E = TypeVar("E")
_NO_MEMORY, _NOT_FINITE = -1, -2
_MOST_POSITIONS = 1 << 24
_PARTS = {"attention": 1, "network": 2, "head": 4}
_MATRICES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
}  # fmt: skip
_NORMS = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm",
}  # fmt: skip


class NativeBatchEngine:
    """Decodes several sequences together, each in a slot of its own; weights are read once a step for all of them.

    Weights are packed once, when the model is loaded, and shared ones are one copy in memory. What is computed for a sequence
    does not depend, bit for bit, on how many others are fed beside it, nor on how its tokens are cut into feeds.

    Args:
        model: what :func:`mobillama.engine.gguf_model.read_model` returned; it is not needed afterwards.
        slots: number of sequences.
        threads: to compute with; 0: one for each core that this process may use.
        with_kernels: one of :func:`mobillama.native.library.kernels`; empty: the best.
        exact: multiply in floats instead of 8-bit activations; slow, for comparison.
        cache: type of keys and values, f16, or q8_0 where heads are a multiple of 32 wide; empty: q8_0 where that can be and
            weights are quantized too.
        context_length: tokens that a slot holds; 0: what the model was made for.

    Raises:
        CorruptDataError: weights are infinite or no numbers.
        UsageError: the model with this context does not fit the memory.
    """

    name = "native"

    def __init__(
        self,
        model: GGUFModel,
        slots: int,
        threads: int = 0,
        with_kernels: str = "",
        exact: bool = False,
        cache: str = "",
        context_length: int = 0,
    ) -> None:
        shape = model.shape
        self.slots, self.vocab_size = slots, shape.vocab_size
        self.context_length = context_length or shape.max_position_embeddings
        if self.context_length > _MOST_POSITIONS:
            raise self._too_large()
        self._lengths = [0] * slots
        self._library = library()
        self._chunk = self._library.mobillama_chunk()
        self._model = self._library.mobillama_new(
            Shape(
                shape.vocab_size,
                shape.hidden_size,
                shape.intermediate_size,
                shape.num_hidden_layers,
                shape.num_attention_heads,
                shape.key_value_heads,
                shape.attention_head_dim,
                self.context_length,
                slots,
                shape.rms_norm_eps,
                shape.rope_theta,
                exact,
                (TYPES[cache] if cache else _cache_type(model, exact)).code,
            ),
            threads or available_cores(),
            (with_kernels or kernels()[0]).encode(),
        )
        if not self._model:
            raise MobiLlamaError(
                f"native engine: no memory, or no kernels '{with_kernels}'; known: {', '.join(kernels())}"
            )
        self._load(model)
        self._most_rows = max(tensor.shape[0] for tensor in model.tensors.values())
        weights = sum(tensor.nbytes for tensor in model.tensors.values())
        table = model.tensors[EMBEDDING].nbytes if HEAD in model.tensors else 0
        self.memory = Memory(weights, weights - table, self._library.mobillama_cache_bytes(self._model))

    @classmethod
    def load(cls, path: Path, slots: int, threads: int = 0, context_length: int = 0) -> NativeBatchEngine:
        """Open a GGUF file, shared or not.

        Raises:
            UsageError: it is no GGUF of a Llama, holds types that are not read here, ``context_length`` is more than it was
                made for, or the library is missing and cannot be compiled.
            CorruptDataError: it is damaged.
        """

        def engine_of(model: GGUFModel) -> NativeBatchEngine:
            context = chosen_context(path, context_length, model.shape.max_position_embeddings)
            return cls(model, slots, threads, context_length=context)

        return _opened(path, engine_of)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.mobillama_free(self._model)

    def length(self, slot: int) -> int:
        """Return the number of tokens that a slot has taken in."""
        return self._lengths[slot]

    def feed(self, work: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.float32]:
        """Take in tokens (slot, ids); return the logits (work, vocabulary) that follow the last token of each.

        Raises:
            ValueError: no work, a slot named twice or not there, no tokens, ids outside the vocabulary, or more than
                ``context_length`` in a slot.
        """
        return self._feed(work, each=False)

    def feed_each(self, work: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.float32]:
        """Take in tokens like :meth:`feed`; return the logits (all tokens, vocabulary) that follow each."""
        return self._feed(work, each=True)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all tokens of a slot from position ``length`` on."""
        self._lengths[slot] = min(length, self._lengths[slot])

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a slot hold the first ``length`` tokens of another."""
        kept = min(length, self._lengths[source])
        self._library.mobillama_copy(self._model, source, target, kept)
        self._lengths[target] = kept

    def multiply_only(self, tokens: int, parts: Sequence[str] = tuple(_PARTS), in_step: bool = False) -> None:
        """Do matrix products of a forward pass and nothing else: the bounds that ``benchmarks/kernels.py`` measures against.

        Args:
            tokens: number of vectors that each matrix is multiplied with, at most a chunk; 0: weights are read and no more.
            parts: attention, network, head.
            in_step: whether threads wait for one another where the next product needs all of the last ones, as in a pass.
        """
        mask, tokens = sum(_PARTS[part] for part in parts), min(tokens, self._chunk)
        self._library.mobillama_multiply_only(self._model, mask, tokens, in_step, self._products.ctypes.data)

    @functools.cached_property
    def _products(self) -> NDArray[np.float32]:
        return np.empty(self._most_rows * self._chunk, np.float32)

    def _feed(self, work: Sequence[tuple[int, Sequence[int]]], each: bool) -> NDArray[np.float32]:
        check_work(work, self)
        # Between two tokens the weights have driven Python out of the caches: what it does here costs many times its usual.
        ids_t = array("i", [token for _, ids in work for token in ids])
        logits_wv = np.empty((len(ids_t) if each else len(work), self.vocab_size), np.float32)
        ids, logits = ids_t.buffer_info()[0], ctypes.addressof(ctypes.c_char.from_buffer(logits_wv.data))
        for runs in self._passes(work, each):
            self._library.mobillama_feed(self._model, ids, (Run * len(runs))(*runs), len(runs), logits)
            for run in runs:
                self._lengths[run.slot] += run.tokens
                ids += run.tokens * ids_t.itemsize
                logits += run.wanted * logits_wv.strides[0]
        return logits_wv

    def _passes(self, work: Sequence[tuple[int, Sequence[int]]], each: bool) -> Iterator[list[Run]]:
        """Yield the runs of each pass, a chunk of tokens at most."""
        runs: list[Run] = []
        room = self._chunk
        for slot, ids in work:
            start, left = self._lengths[slot], len(ids)
            while left:
                tokens = min(left, room)
                left -= tokens
                runs.append(Run(slot, start, tokens, tokens if each else int(not left)))
                start, room = start + tokens, room - tokens
                if not room:
                    yield runs
                    runs, room = [], self._chunk
        if runs:
            yield runs

    def _too_large(self) -> UsageError:
        return does_not_fit("native engine", self.context_length)

    def _load(self, model: GGUFModel) -> None:
        numbers = {name: self._add(name, tensor) for name, tensor in model.tensors.items()}
        layers = (Layer * model.shape.num_hidden_layers)()
        for layer, (block, ffn) in zip(layers, model.shape.layer_weights, strict=True):
            for field, name in (_MATRICES | _NORMS).items():
                setattr(layer, field, numbers.get(f"model.layers.{block}.{name}.weight", -1))
            for field in ("gate", "up", "down"):
                setattr(layer, field, numbers[f"model.ffns.{ffn}.{field}_proj.weight"])
        head = numbers.get(HEAD, numbers[EMBEDDING])
        final_norm = numbers["model.norm.weight"]
        if not self._library.mobillama_prepare(self._model, layers, len(layers), numbers[EMBEDDING], head, final_norm):
            raise self._too_large()

    def _add(self, name: str, tensor: Tensor) -> int:
        rows = np.ascontiguousarray(tensor.rows)
        if len(tensor.shape) == 1:
            vector = decode(rows, tensor.kind).reshape(-1)
            number = self._library.mobillama_add_vector(self._model, vector.ctypes.data, len(vector))
        else:
            number = self._library.mobillama_add_matrix(self._model, tensor.kind.code, *tensor.shape, rows.ctypes.data)
        if number == _NOT_FINITE:
            raise CorruptDataError(f"'{name}' holds infinite numbers or NaN; fetch or export the file again")
        if number == _NO_MEMORY:
            raise self._too_large()
        return int(number)


class NativeEngine:
    """Decodes one sequence: a batch of one. Arguments and errors are those of :class:`NativeBatchEngine`."""

    name = "native"

    def __init__(
        self,
        model: GGUFModel,
        threads: int = 0,
        with_kernels: str = "",
        exact: bool = False,
        cache: str = "",
        context_length: int = 0,
    ) -> None:
        self._batch = NativeBatchEngine(model, 1, threads, with_kernels, exact, cache, context_length)
        self.context_length, self.vocab_size = self._batch.context_length, self._batch.vocab_size
        self.memory = self._batch.memory

    @classmethod
    def load(cls, path: Path, threads: int = 0, context_length: int = 0) -> NativeEngine:
        """Open a GGUF file; errors are those of :meth:`NativeBatchEngine.load`."""

        def engine_of(model: GGUFModel) -> NativeEngine:
            context = chosen_context(path, context_length, model.shape.max_position_embeddings)
            return cls(model, threads, context_length=context)

        return _opened(path, engine_of)

    @property
    def length(self) -> int:
        """Number of tokens taken in."""
        return self._batch.length(0)

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens; return the logits (vocabulary,) that follow the last one.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than ``context_length`` in all.
        """
        return self._batch.feed([(0, ids)])[0]

    def feed_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens like :meth:`feed`; return the logits (tokens, vocabulary) that follow each."""
        return self._batch.feed_each([(0, ids)])

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self._batch.truncate(0, length)


def _cache_type(model: GGUFModel, exact: bool) -> BlockType:
    quantized = model.tensors["model.layers.0.self_attn.k_proj.weight"].kind.is_quantized
    return Q8_0 if quantized and not exact and model.shape.attention_head_dim % Q8_0.values == 0 else F16


def _opened(path: Path, engine_of: Callable[[GGUFModel], E]) -> E:
    try:
        library()
    except CannotBuild as error:
        raise UsageError(f"{path}: {error}; or take --engine torch") from None
    model = read_model(path)
    try:
        return engine_of(model)
    except CorruptDataError as error:
        raise CorruptDataError(f"{path}: {error}") from None
