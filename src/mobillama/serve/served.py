"""The model that is served: engine, tokenizer, turns, and what can be said of it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobillama.data.template import ChatTemplate
from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.gguf import is_gguf, read_gguf
from mobillama.engine.interface import BatchEngine
from mobillama.engine.load import GRAPH_FILE, load_batch_engine
from mobillama.record.files import read_json, sha256_file
from mobillama.serve.turns import Continuation, Turns, turns_of


@dataclass(frozen=True)
class Served:
    """A model, ready to answer."""

    name: str
    engine: BatchEngine
    tokenizer: Tokenizer
    turns: Turns
    digest: str
    """``sha256:`` and the digest of the file that holds the weights."""
    weights: dict[str, Any]
    """Parameters and number format, as the file states them."""
    created: int = field(default_factory=lambda: int(time.time()))

    def facts(self) -> dict[str, Any]:
        """Return OpenAI's model object, with this project's facts under ``mobillama``."""
        engine = self.engine
        facts = {
            **self.weights,
            "weight_bytes": engine.memory.weights,
            "context_length": engine.context_length,
            "vocabulary": engine.vocab_size,
            "engine": engine.name,
            "slots": engine.slots,
            "digest": self.digest,
            "has_chat_template": not isinstance(self.turns, Continuation),
        }
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "local", "mobillama": facts}


def open_served(
    path: Path,
    name: str = "",
    slots: int = 8,
    engine: str = "auto",
    threads: int = 0,
    device: str = "auto",
    context: int = 0,
) -> Served:
    """Open a model to serve; arguments are those of :func:`mobillama.engine.load.load_batch_engine`.

    Raises:
        UsageError: there is no model, the engine cannot open it, or its chat template is none.
        CorruptDataError: it is damaged.
    """
    opened, tokenizer = load_batch_engine(path, slots, engine, threads, device, context)
    file, turns = _weights_file(path), turns_of(tokenizer)
    if isinstance(turns, ChatTemplate):
        turns.place = "the model's chat template"  # clients are told of its errors, not of this machine's paths
    return Served(
        name or path.resolve().name.removesuffix(".gguf"),
        opened,
        tokenizer,
        turns,
        f"sha256:{sha256_file(file)}",
        _weights_of(file),
    )


def _weights_file(path: Path) -> Path:
    if path.is_file() and path.suffix != ".onnx":
        return path
    directory = path if path.is_dir() else path.parent
    names = ("model.safetensors", f"{GRAPH_FILE}.data", GRAPH_FILE)
    return next(file for name in names if (file := directory / name).is_file())


def _weights_of(file: Path) -> dict[str, Any]:
    if is_gguf(file):
        tensors = read_gguf(file).tensors.values()
        sizes: dict[str, int] = {}
        for tensor in tensors:
            sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.nbytes
        return {
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "number_format": max(sizes, key=lambda kind: sizes[kind]),
        }
    config = file.with_name("config.json")
    stated = read_json(config) if config.is_file() else {}
    return {"parameters": _stored_parameters(file), "number_format": stated.get("dtype", "float32")}


def _stored_parameters(file: Path) -> int | None:
    """Return what the header of a safetensors file states; None of other files."""
    if file.suffix != ".safetensors":
        return None
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(its["shape"]) for name, its in header.items() if name != "__metadata__")
