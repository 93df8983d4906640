"""Export to GGUF: for this project's engines with what layers share stored once, or for stock llama.cpp with copies of it.

Codes of a quantized source are stored as they are where the wanted type is theirs: a calibrated model keeps its calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobillama.data.tokenizer import Tokenizer, load_tokenizer
from mobillama.deploy.parity import Parity, compare, passages, torch_logits
from mobillama.directory import load_model
from mobillama.engine.blocks import BF16, F16, F32, Q4_0, Q4_1, Q8_0, BlockType
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import read_model, write_model
from mobillama.engine.torch_gguf import decode_weights, encode_weights, load_gguf
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig
from mobillama.record.files import replaced_file, write_json

# What each type may cost in KL (nats/token) before something else than rounding must be at fault.
MOST_KL = {F32.name: 1e-6, F16.name: 1e-3, BF16.name: 1e-2, Q8_0.name: 0.05, Q4_0.name: 1.0, Q4_1.name: 1.0}

Show = Callable[[str, float, float], None]


def quiet(stage: str, done: float, total: float) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Source:
    """A model to export: a model directory, or a GGUF file of this project."""

    shape: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, torch.Tensor]
    """In the type that they are stored in; decoded where that is none of torch's."""
    encoded: dict[str, Tensor] | None
    """The same as encoded bytes, where the source has them."""
    name: str
    """For people."""

    @classmethod
    def open(cls, path: Path) -> Source:
        """Read a model directory or a GGUF file.

        Raises:
            UsageError: it is neither.
            CorruptDataError: it is damaged.
        """
        if path.is_file():
            read = read_model(path)
            return cls(read.shape, read.tokenizer, decode_weights(read), read.tensors, _name(path))
        model = load_model(path)
        return cls(model.model.shape, load_tokenizer(path), model.state_dict(), None, _name(path))

    def model(self) -> MobiLlama:
        """Return the model in float32, in evaluation mode."""
        with torch.device("meta"):
            model = MobiLlama(self.shape)
        model.load_state_dict(self.weights, assign=True)
        return model.float().eval()


def export_gguf(
    source: Path, out: Path, kind: BlockType | None, shared: bool | None = None, tokens: int = 1024, show: Show = quiet
) -> dict[str, Any]:
    """Write a model as a GGUF file, read it again, and compare it with the model on real text.

    Args:
        source: a model directory or a GGUF file.
        out: the file to make; the figures are recorded beside it as ``OUT.json``.
        kind: of matrices; None: as the source has them, a directory's as F16. The head of a 4-bit file is Q8_0.
        shared: store what layers share once; None: if they share anything.
        tokens: predictions that are compared.
        show: told the progress.

    Returns:
        What is recorded: types, bytes, and the figures of :class:`mobillama.deploy.parity.Parity`.

    Raises:
        UsageError: ``out`` exists, or ``source`` is no model.
        VerificationError: the file computes something else than rounding explains; nothing is kept.
    """
    refuse_existing(out)
    opened = Source.open(source)
    shared = opened.shape.share != "none" if shared is None else shared
    return write_checked(opened, _encoded(opened, kind), out, shared, tokens=tokens, show=show)


def write_checked(
    source: Source,
    tensors: Mapping[str, Tensor],
    out: Path,
    shared: bool,
    metadata: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    tokens: int = 1024,
    show: Show = quiet,
) -> dict[str, Any]:
    """Write encoded tensors of a model as a GGUF file, read it again, and compare it with the model on real text.

    Args:
        source: the model.
        tensors: its weights as they are to be stored, by name.
        out: the file to make; the figures are recorded beside it as ``OUT.json``.
        shared: store what layers share once.
        metadata: what the file states beyond shape and tokenizer.
        facts: what is recorded beyond the check's figures.
        tokens: predictions that are compared.
        show: told the progress.

    Returns:
        What is recorded.

    Raises:
        UsageError: ``out`` exists.
        VerificationError: the file computes something else than rounding explains; nothing is kept.
    """
    refuse_existing(out)
    with replaced_file(out) as work:
        write_model(
            work,
            source.shape,
            tensors,
            source.tokenizer,
            shared,
            source.name,
            metadata,
            lambda done, total: show("write bytes", done, total),
        )
        rows = passages(source.tokenizer, source.shape.max_position_embeddings, tokens)
        expected = _logits_of(source, rows, show)
        copy, tokenizer = load_gguf(work, torch.float32)
        parity = compare(lambda ids: next(expected), torch_logits(copy), rows, tokenizer, show)
        parity.require(out, max(MOST_KL[tensor.kind.name] for tensor in tensors.values()))
        record = _facts(source.name, work, shared, tensors, parity) | dict(facts or {})
    write_json(out.with_name(f"{out.name}.json"), record)
    return record


def refuse_existing(out: Path) -> None:
    """Raise a UsageError if there is something at ``out`` already."""
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another name or remove it")


def _logits_of(source: Source, rows: list[list[int]], show: Show) -> Iterator[NDArray[np.float32]]:
    """Return the model's logits on all passages, computed now, so that model and copy are never in memory together."""
    logits, found = torch_logits(source.model()), []
    for done, row in enumerate(rows, 1):
        found.append(logits(row[:-1]))
        show("compute passages", done, len(rows))
    return iter(found)


def _encoded(source: Source, kind: BlockType | None) -> dict[str, Tensor]:
    """Return all tensors as they are to be stored; bytes that have the wanted type already are taken as they are."""
    if source.encoded is not None and kind is None:
        return source.encoded
    kind = kind or F16
    wanted = encode_weights(source.weights, kind, head_kind(kind))
    for name, tensor in (source.encoded or {}).items():
        if tensor.kind == wanted[name].kind:
            wanted[name] = tensor
    return wanted


def head_kind(kind: BlockType) -> BlockType:
    """Return the type of the head in a file of ``kind``: eight bits where the rest has four.

    Its rounding meets every prediction directly, and nothing after it can make up for it.
    """
    return Q8_0 if kind in (Q4_0, Q4_1) else kind


def _name(source: Path) -> str:
    """Return a name for people: a checkpoint's ``model`` directory is called by its run and step."""
    place = source.resolve()
    if place.parent.parent.name == "checkpoints":
        return f"{place.parents[2].name}-{place.parent.name}"
    return place.stem if source.is_file() else place.name


def _facts(name: str, out: Path, shared: bool, tensors: Mapping[str, Tensor], parity: Parity) -> dict[str, Any]:
    kinds = {name: tensor.kind.name for name, tensor in tensors.items() if len(tensor.shape) == 2}
    head = kinds.pop(HEAD if HEAD in kinds else EMBEDDING)
    return {
        "model": name,
        "format": "gguf",
        "shared": shared,
        "types": sorted(set(kinds.values())),
        "head": head,
        "bytes": out.stat().st_size,
        "parity": parity.record(),
    }
