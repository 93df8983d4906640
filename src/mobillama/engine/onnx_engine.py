"""Decoding with ONNX Runtime: the file that :mod:`mobillama.deploy.onnx` writes. Imports no torch."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import OrtValue

from mobillama.engine.interface import Memory, check_tokens, does_not_fit
from mobillama.engine.load import GRAPH_FILE
from mobillama.errors import CorruptDataError, UsageError, cause

DATA_FILE = "model.onnx.data"
FORMAT = "mobillama-onnx-1"
METADATA_KEY = "mobillama"
# Tokens taken in at once: enough to reuse each weight well, few enough that activations stay small.
_CHUNK = 64
_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


class OnnxEngine:
    """Decodes one sequence with ONNX Runtime. Keys and values lie in buffers that attention extends in place.

    Args:
        session: of a graph that this project exported; see :meth:`load`.
        facts: what the graph's metadata state.
    """

    name = "onnxruntime"

    def __init__(self, session: Any, facts: dict[str, Any]) -> None:
        self.context_length = int(facts["shape"]["max_position_embeddings"])
        self.vocab_size = int(facts["shape"]["vocab_size"])
        self.length = 0
        self._session = session
        self._cache = {
            item.name: _lazy_zeros(item.shape, _TYPES[item.type])
            for item in session.get_inputs()
            if item.name.startswith(("past_key_", "past_value_"))
        }
        self.memory = Memory(
            int(facts["weights"]), int(facts["read_per_token"]), sum(part.nbytes for part in self._cache.values())
        )
        self._past, self._first = np.zeros(1, np.int32), np.zeros(1, np.int64)
        self._token, self._logits = np.zeros((1, 1), np.int64), np.zeros((1, 1, self.vocab_size), np.float32)
        self._step = self._bind(self._token, self._logits)

    @classmethod
    def load(cls, path: Path, threads: int = 0) -> OnnxEngine:
        """Open an exported graph.

        Args:
            path: the .onnx file, or the directory that holds it.
            threads: to compute with; 0: one for each core.

        Raises:
            UsageError: there is none, another tool made it, or its context does not fit the memory.
            CorruptDataError: it is damaged.
        """
        if path.is_dir():
            path = path / GRAPH_FILE
        if not path.is_file():
            raise UsageError(f"{path}: no such file; make one with 'mobillama export onnx'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is raised as well
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a dozen exceptions without a common base
            raise CorruptDataError(f"{path}: ONNX Runtime cannot load it ({_said(error)}); export it again") from None
        _return_freed_memory()
        try:
            stated = json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))
            if stated.get("format") != FORMAT:
                raise UsageError(f"{path}: was not made by 'mobillama export onnx' (no {FORMAT} in its metadata)")
            return cls(session, stated)
        except (OSError, OverflowError, MemoryError):  # of mmap
            context = stated["shape"]["max_position_embeddings"]
            raise does_not_fit(path, context, "export it again with --context") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptDataError(f"{path}: its metadata are damaged ({error!r:.80}); export it again") from None

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens; return the logits (vocabulary,) that follow the last one.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or more than ``context_length`` in all.
        """
        check_tokens(ids, self)
        ids_1t = np.array([ids], np.int64)
        for start in range(0, len(ids), _CHUNK):
            chunk_1t = ids_1t[:, start : start + _CHUNK]
            self._first[0] = chunk_1t.size - 1
            if chunk_1t.size == 1:
                self._token[:] = chunk_1t
                self._run(self._step, 1)
            else:
                self._run(self._bind(chunk_1t, self._logits), chunk_1t.size)
        return self._logits[0, 0].copy()

    def feed_each(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens like :meth:`feed`; return the logits (tokens, vocabulary) that follow each."""
        check_tokens(ids, self)
        ids_1t = np.array([ids], np.int64)
        logits_1tv = np.empty((1, len(ids), self.vocab_size), np.float32)
        self._first[0] = 0
        for start in range(0, len(ids), _CHUNK):
            chunk_1t = ids_1t[:, start : start + _CHUNK]
            self._run(self._bind(chunk_1t, logits_1tv[:, start : start + _CHUNK]), chunk_1t.size)
        return logits_1tv[0]

    def keys_and_values(self) -> dict[str, NDArray[Any]]:
        """Return what is held, by the graph's names: ``past_key_0`` (1, h, tokens, d) and so on."""
        return {name: part[:, :, : self.length] for name, part in self._cache.items()}

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self.length = min(length, self.length)

    def _run(self, binding: Any, tokens: int) -> None:
        self._past[0] = self.length
        self._session.run_with_iobinding(binding)
        self.length += tokens

    def _bind(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> Any:
        """Return a binding of these buffers, of the lengths and of the cache, each read and written where it lies.

        It does not keep the buffers alive.
        """
        binding = self._session.io_binding()
        inputs = {"input_ids": ids, "past_length": self._past, "first": self._first, **self._cache}
        outputs = {"logits": logits} | {name.replace("past", "present"): part for name, part in self._cache.items()}
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(buffer))
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, OrtValue.ortvalue_from_numpy(buffer))
        return binding


def _said(error: Exception) -> str:
    """Return the innermost of what the runtime says, without the places in its own sources."""
    words = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", str(error))[-1]
    return cause(ValueError(re.sub(r"\S+\.(cc|h):\d+ \S+ ", "", words)))


def _lazy_zeros(shape: Sequence[int], kind: type[Any]) -> NDArray[Any]:
    """Return zeros that take memory page by page as they are written.

    numpy asks for huge pages, and the first token of each head would take one.
    """
    count = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(kind).itemsize), kind).reshape(shape)


def _return_freed_memory() -> None:
    """Give back what packing the weights left free in glibc's heap: 22 MiB of a 0.5B model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
