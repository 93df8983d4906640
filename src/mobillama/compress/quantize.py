"""Quantizing a model into the shared GGUF file, and what it costs on text that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import torch

from mobillama.compress.calibrate import Calibration
from mobillama.compress.texts import Texts, find_texts
from mobillama.deploy.gguf import record_of, write_checked
from mobillama.deploy.parity import Comparison, Logits, Parity, torch_logits
from mobillama.deploy.source import Source, head_kind, refuse_existing
from mobillama.engine.blocks import BlockType, pack
from mobillama.engine.gguf import Tensor
from mobillama.engine.torch_gguf import encode_weights
from mobillama.engine.weights import HEAD
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama
from mobillama.progress import Show, quiet
from mobillama.train.device import choose_device

Method = Literal["rtn", "gptq"]
SEQUENCES = 64
_BATCH_TOKENS = 8192


def quantize(
    source: Path,
    out: Path,
    kind: BlockType,
    method: Method = "gptq",
    calibration: Path | None = None,
    sequences: int = SEQUENCES,
    seed: int = 0,
    device: str = "auto",
    show: Show = quiet,
) -> dict[str, Any]:
    """Write a model with quantized matrices as a GGUF file that holds what layers share once.

    Args:
        source: a model directory or a GGUF file.
        out: the file to make; the figures are recorded beside it as ``OUT.json``, and in short in its metadata.
        kind: of matrices; the head of a 4-bit file is Q8_0.
        method: ``rtn`` rounds to nearest, as ggml does; ``gptq`` chooses codes by what they do to outputs on real text.
        calibration: that text, and held-out text to judge by (:func:`mobillama.compress.texts.find_texts`).
        sequences: to calibrate on.
        seed: of the draw of sequences.
        device: that the model computes on: cpu, cuda or auto.
        show: told the progress.

    Returns:
        What is recorded.

    Raises:
        UsageError: ``out`` or ``OUT.json`` exists, ``source`` is no model, or the text does not suit it.
        CorruptDataError: the model or the data is damaged.
        VerificationError: the file holds something else than was chosen; nothing is kept.
    """
    refuse_existing(out, record_of(out))
    chosen = choose_device(device)
    opened = Source.open(source)
    _require_finite(opened)
    texts = find_texts(calibration, opened.tokenizer, opened.shape.max_position_embeddings, sequences, seed)
    if method == "gptq":
        _require_enough(texts, opened)
        tensors = calibrated(opened, kind, texts, chosen, show)
    else:
        tensors = opened.checked(rounded(opened, kind), out)
    judged = judge(opened, tensors, texts, chosen, show)
    used = {"sequences": len(texts.calibration_nt), "tokens": texts.calibration_nt.size, "seed": seed}
    weights = sum(weight.numel() for weight in opened.weights.values())
    facts = {
        "method": method,
        "bits_per_weight": 8 * sum(tensor.nbytes for tensor in tensors.values()) / weights,
        "calibration": {"text": texts.name, **used} if method == "gptq" else None,
        "held_out": {name: parity.record() for name, parity in judged.items()},
    }
    whole = judged["all"]
    stated = {
        "method": method,
        "held_out": f"{whole.tokens} tokens of {texts.name}",
        "bits_per_byte_before": whole.bits_per_byte_model,
        "bits_per_byte_after": whole.bits_per_byte_copy,
    }
    if method == "gptq":
        stated["calibration"] = f"{used['tokens']} tokens of {texts.name}, seed {seed}"
    metadata = {f"mobillama.quantization.{key}": value for key, value in stated.items()}
    return write_checked(opened, tensors, out, opened.shape.share != "none", metadata, facts, show=show)


def rounded(source: Source, kind: BlockType) -> dict[str, Tensor]:
    """Return a model's tensors rounded to nearest."""
    return encode_weights(source.weights, kind, head_kind(kind))


def calibrated(
    source: Source,
    kind: BlockType,
    texts: Texts,
    device: torch.device,
    show: Show = quiet,
    uses: Collection[int] | None = None,
    network_first: bool = False,
) -> dict[str, Tensor]:
    """Return a model's tensors with codes chosen by calibration; the head is rounded to nearest.

    ``uses`` and ``network_first`` are :class:`mobillama.compress.calibrate.Calibration`'s.
    """
    tensors = rounded(source, kind)
    kinds = {name: tensor.kind for name, tensor in tensors.items() if tensor.kind.is_quantized and name != HEAD}
    ids_nt = torch.from_numpy(texts.calibration_nt).to(device)
    batches = torch.split(ids_nt, max(1, _BATCH_TOKENS // ids_nt.shape[1]))
    walked: Callable[[int, int], None] = lambda done, total: show("calibrate", done, total)  # noqa: E731
    model = source.model().to(device)
    for name, blocks in Calibration(model, batches, kinds, uses, network_first, walked).run().items():
        tensors[name] = Tensor(name, tensors[name].shape, kinds[name], pack(blocks, kinds[name]))
    return tensors


def judge(
    source: Source, tensors: dict[str, Tensor], texts: Texts, device: torch.device, show: Show = quiet
) -> dict[str, Parity]:
    """Return how far encoded tensors are from their model on held-out text: of each source, and of ``all``."""
    ours, theirs = (_logits(model, device) for model in (source.model(), source.decoded(tensors)))
    found, done = {name: Comparison(source.tokenizer) for name in texts.held_out}, 0
    for name, rows_nt in texts.held_out.items():
        for row in rows_nt.tolist():
            found[name].add(row, ours(row[:-1]), theirs(row[:-1]))
            show("judge sequences", done := done + 1, sum(map(len, texts.held_out.values())))
    whole = Comparison(source.tokenizer)
    for comparison in found.values():
        whole.merge(comparison)
    return {"all": whole.result()} | {name: comparison.result() for name, comparison in found.items()}


def _logits(model: MobiLlama, device: torch.device) -> Logits:
    model.to(device).eval()
    return torch_logits(lambda ids: model(ids.to(device)))


def _require_finite(source: Source) -> None:
    for name, weight in source.weights.items():
        if not weight.isfinite().all():
            raise UsageError(f"{source.name}: {name} holds infinite numbers or NaN; take an earlier checkpoint")


def _require_enough(texts: Texts, source: Source) -> None:
    widest = max(weight.shape[-1] for name, weight in source.weights.items() if weight.dim() == 2)
    if texts.calibration_nt.size < widest:
        raise UsageError(
            f"--calibration: {texts.calibration_nt.size:,} tokens of {texts.name} are fewer than the {widest:,} inputs of the "
            "widest matrix; give more text, or raise --sequences"
        )
