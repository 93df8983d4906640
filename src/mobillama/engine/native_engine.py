"""Decoding a GGUF file with the project's own kernels (:mod:`mobillama.native`). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobillama.engine.blocks import decode
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import EMBEDDING, HEAD, GGUFModel, read_model
from mobillama.engine.interface import Memory, check_tokens
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError
from mobillama.native.build import CannotBuild
from mobillama.native.library import Layer, Shape, kernels, library
from mobillama.record.environment import available_cores

_NO_MEMORY, _NOT_FINITE = -1, -2
_MATRICES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
}  # fmt: skip
_NORMS = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm",
}  # fmt: skip


class NativeEngine:
    """Decodes one sequence. Weights are packed once, when the model is loaded, and shared ones are one copy in memory.

    Args:
        model: what :func:`mobillama.engine.gguf_model.read_model` returned; it is not needed afterwards.
        threads: to compute with; 0: one for each core that this process may use.
        with_kernels: one of :func:`mobillama.native.library.kernels`; empty: the best.
        exact: multiply in floats instead of 8-bit activations; slow, for comparison.

    Raises:
        CorruptDataError: weights are infinite or no numbers.
        MobiLlamaError: there is not enough memory.
    """

    name = "native"

    def __init__(self, model: GGUFModel, threads: int = 0, with_kernels: str = "", exact: bool = False) -> None:
        shape = model.shape
        self.context_length, self.vocab_size = shape.max_position_embeddings, shape.vocab_size
        self.length = 0
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
                shape.max_position_embeddings,
                shape.rms_norm_eps,
                shape.rope_theta,
                exact,
            ),
            threads or available_cores(),
            (with_kernels or kernels()[0]).encode(),
        )
        if not self._model:
            raise MobiLlamaError(
                f"native engine: no memory, or no kernels '{with_kernels}'; known: {', '.join(kernels())}"
            )
        self._load(model)
        most_rows = max(tensor.shape[0] for tensor in model.tensors.values())
        self._products = np.empty(most_rows * self._chunk, np.float32)  # takes memory only where it is written
        weights = sum(tensor.nbytes for tensor in model.tensors.values())
        table = model.tensors[EMBEDDING].nbytes if HEAD in model.tensors else 0
        positions, width = -(-self.context_length // 16) * 16, shape.attention_head_dim
        cache = 2 * shape.num_hidden_layers * shape.key_value_heads * positions * (width + -(-width // 16) * 16)
        self.memory = Memory(weights, weights - table, cache)

    @classmethod
    def load(cls, path: Path, threads: int = 0) -> NativeEngine:
        """Open a GGUF file, shared or not.

        Raises:
            UsageError: it is no GGUF of a Llama, holds types that are not read here, or the library is missing and cannot
                be compiled.
            CorruptDataError: it is damaged.
        """
        try:
            library()
        except CannotBuild as error:
            raise UsageError(f"{path}: {error}; leave --engine out to decode with another engine") from None
        model = read_model(path)
        try:
            return cls(model, threads)
        except CorruptDataError as error:
            raise CorruptDataError(f"{path}: {error}") from None

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.mobillama_free(self._model)

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens; return the logits (vocabulary,) that follow the last one.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than ``context_length`` in all.
        """
        check_tokens(ids, self)
        logits_v = np.empty(self.vocab_size, np.float32)
        for start in range(0, len(ids), self._chunk):
            self._feed(ids[start : start + self._chunk], logits_v, each=False)
        return logits_v

    def feed_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens like :meth:`feed`; return the logits (tokens, vocabulary) that follow each."""
        check_tokens(ids, self)
        logits_tv = np.empty((len(ids), self.vocab_size), np.float32)
        for start in range(0, len(ids), self._chunk):
            part = slice(start, start + self._chunk)
            self._feed(ids[part], logits_tv[part], each=True)
        return logits_tv

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self.length = min(length, self.length)

    def multiply_only(self, tokens: int) -> None:
        """Do the matrix products of a forward pass and nothing else: the bound that ``benchmarks/kernels.py`` measures against.

        Args:
            tokens: number of vectors that each matrix is multiplied with, at most a chunk.
        """
        self._library.mobillama_multiply_only(self._model, min(tokens, self._chunk), self._products.ctypes.data)

    def _feed(self, ids: Sequence[int], logits: NDArray[np.float32], each: bool) -> None:
        ids_t = np.array(ids, np.int32)
        self._library.mobillama_feed(self._model, ids_t.ctypes.data, len(ids_t), self.length, logits.ctypes.data, each)
        self.length += len(ids_t)

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
            raise MobiLlamaError(_TOO_LARGE)

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
            raise MobiLlamaError(_TOO_LARGE)
        return int(number)


_TOO_LARGE = "native engine: the model and its context do not fit the memory; close other programs"
