"""Export to GGUF: for this project's engines with what layers share stored once, or for stock llama.cpp with copies of it.

Codes of a quantized source are stored as they are where the wanted type is theirs: a calibrated model keeps its calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobillama.deploy.parity import Parity, compare, passages, recorded, torch_logits
from mobillama.deploy.source import Source, head_kind, refuse_existing
from mobillama.engine.blocks import F16, BlockType, decode
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import write_model
from mobillama.engine.torch_gguf import encode_weights, load_gguf
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.errors import VerificationError
from mobillama.model.transformer import MobiLlama
from mobillama.progress import Show, quiet
from mobillama.record.files import replaced_file, write_json


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
        UsageError: ``out`` or ``OUT.json`` exists, or ``source`` is no model.
        VerificationError: the file holds something else than rounding explains; nothing is kept.
    """
    refuse_existing(out, record_of(out))
    opened = Source.open(source)
    shared = opened.shape.share != "none" if shared is None else shared
    tensors = opened.checked(_encoded(opened, kind), out)
    return write_checked(opened, tensors, out, shared, tokens=tokens, show=show)


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
    """Write encoded tensors of a model as a GGUF file, read it again, and tell what they cost on real text.

    The file must hold exactly the numbers that the tensors decode to. How far they are from the model's is recorded.

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
        UsageError: ``out`` or ``OUT.json`` exists.
        VerificationError: the file holds other numbers than the tensors; nothing is kept.
    """
    refuse_existing(out, record_of(out))
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
        _require_same_numbers(copy, tensors, out)
        parity = compare(recorded(expected), torch_logits(copy), rows, tokenizer, show)
        record = _facts(source.name, work, shared, tensors, parity) | dict(facts or {})
    write_json(record_of(out), record)
    return record


def record_of(out: Path) -> Path:
    """Return the place of the figures of an exported file."""
    return out.with_name(f"{out.name}.json")


def _require_same_numbers(copy: MobiLlama, tensors: Mapping[str, Tensor], place: Path) -> None:
    """Raise a VerificationError if a model that was read again holds other numbers than tensors decode to."""
    weights = copy.state_dict()
    for name, tensor in tensors.items():
        if not np.array_equal(weights[name].numpy().reshape(len(tensor.rows), -1), decode(tensor.rows, tensor.kind)):
            raise VerificationError(f"{place}: '{name}' reads otherwise than it was written; report this")


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
