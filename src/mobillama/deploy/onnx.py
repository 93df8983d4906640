"""Export to ONNX Runtime: 4-bit products, the shared network once in the file and once in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.deploy.onnx_cache import quantize_cache
from mobillama.deploy.onnx_graph import FLOAT32_ACTIVATIONS, INT8_ACTIVATIONS, Matrix, write_graph
from mobillama.deploy.parity import compare, passages, recorded, torch_logits
from mobillama.deploy.source import Source, check_memory, head_kind, with_context
from mobillama.engine.blocks import BLOCK, Q4_0, Q8_0, BlockType
from mobillama.engine.gguf import Tensor
from mobillama.engine.onnx_engine import OnnxEngine
from mobillama.engine.torch_gguf import encode_weights
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.errors import UsageError
from mobillama.progress import Show, quiet
from mobillama.recipe import ModelConfig
from mobillama.record.files import new_directory, write_json

RECORD_FILE = "export.json"
# How far from torch on the same numbers sums in another order may be, and activations and cache rounded to 8 bits.
MOST_KL, MOST_KL_8_BIT = 1e-5, 0.02
_LEAST_TOP1 = 0.75
_CALIBRATION = 2048  # tokens that set the scales of an 8-bit cache; none of them is compared
_HEAD_STEP = 16  # ONNX Runtime's attention takes heads of a multiple of this width


def export_onnx(
    source: Path,
    out: Path,
    kind: BlockType | None = None,
    head: BlockType | None = None,
    int8_cache: bool = True,
    int8_activations: bool = True,
    context: int | None = None,
    tokens: int = 1024,
    show: Show = quiet,
) -> dict[str, Any]:
    """Write a model as an ONNX graph, run it with ONNX Runtime, and compare it with the model on real text.

    The graph must compute what torch computes with the numbers that it holds. How far these are from the model's is recorded.

    Args:
        source: a model directory or a GGUF file.
        out: the directory to make: graph, weights, tokenizer, and the figures in ``export.json``.
        kind: of matrices, Q4_0 or Q8_0; None: as a GGUF has them, a directory's as Q4_0.
        head: of the head; None: as a GGUF has it; else eight bits.
        int8_cache: keep keys and values in 8 bits instead of 32.
        int8_activations: round activations to 8 bits before each product; else products are exact, and slow.
        context: tokens that the cache has places for; None: as the model was made for.
        tokens: predictions that are compared.
        show: told the progress.

    Returns:
        What is recorded: types, bytes, and the figures of :class:`mobillama.deploy.parity.Parity`.

    Raises:
        UsageError: ``out`` exists, ``source`` is no model, or its shape is none that ONNX Runtime computes.
        VerificationError: the graph computes something else than rounding explains; nothing is kept.
    """
    with new_directory(out) as work:
        opened = Source.open(source)
        shape = with_context(opened.shape, context)
        _check_shape(source, shape)
        check_memory(source, shape)
        matrices = opened.checked(_matrices(opened, kind, head), out)
        vectors = {name.removesuffix(".weight"): its for name, its in opened.weights.items() if its.dim() == 1}

        def vector(name: str) -> NDArray[np.float32]:
            return vectors[name].float().numpy()

        def matrix(name: str) -> Matrix:
            return matrices[name].rows, matrices[name].kind

        activations = INT8_ACTIVATIONS if int8_activations else FLOAT32_ACTIVATIONS
        write_graph(work, shape, matrix, vector, activations, lambda done, total: show("write layers", done, total))
        save_tokenizer(opened.tokenizer, work)
        length = shape.max_position_embeddings
        rows = passages(opened.tokenizer, length, tokens)
        if int8_cache:
            quantize_cache(work, passages(opened.tokenizer, length, tokens + _CALIBRATION)[len(rows) :])
        engine = OnnxEngine.load(work)

        def copy(ids: Sequence[int]) -> NDArray[np.float32]:
            engine.truncate(0)
            return engine.feed_each(ids)

        given = list(map(copy, (row[:-1] for row in rows)))
        tokenizer = load_tokenizer(work)
        computed = compare(torch_logits(opened.decoded(matrices)), recorded(given), rows, tokenizer)
        computed.require(out, MOST_KL_8_BIT if int8_cache or int8_activations else MOST_KL, _LEAST_TOP1)
        parity = compare(torch_logits(opened.model()), recorded(given), rows, tokenizer)
        kinds = {name: its.kind.name for name, its in matrices.items()}
        facts = {
            "model": source.resolve().name,
            "format": "onnx",
            "shared": shape.share != "none",
            "types": sorted({its for name, its in kinds.items() if name != HEAD}),
            "context": length,
            "cache": "int8" if int8_cache else "float32",
            "activations": "int8" if int8_activations else "float32",
            "head": kinds.get(HEAD, kinds[EMBEDDING]),
            "bytes": sum(file.stat().st_size for file in work.glob("model.onnx*")),
            "parity": parity.record(),
            "parity_on_the_same_numbers": computed.record(),
        }
        write_json(work / RECORD_FILE, facts)
    return facts


def _check_shape(source: Path, shape: ModelConfig) -> None:
    if shape.attention_head_dim % _HEAD_STEP:
        raise UsageError(
            f"{source}: has heads of width {shape.attention_head_dim}; ONNX Runtime's attention takes multiples of "
            f"{_HEAD_STEP}; export it to GGUF"
        )
    for width in (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.attention_head_dim):
        if width % BLOCK:
            raise UsageError(
                f"{source}: has rows of {width} numbers, no whole number of blocks of {BLOCK}; export it to GGUF"
            )


def _matrices(source: Source, kind: BlockType | None, head: BlockType | None) -> dict[str, Tensor]:
    """Return all matrices as Q4_0 or Q8_0; encoded ones of the wanted type are taken as they are.

    MatMulNBits knows a whole zero point for each block, not Q4_1's minimum: such matrices become Q8_0, which keeps them.
    """
    head_name = EMBEDDING if source.shape.tie_word_embeddings else HEAD
    weights = {name: weight for name, weight in source.weights.items() if weight.dim() == 2}
    wanted = encode_weights(weights, kind or Q4_0, head or head_kind(kind or Q4_0))
    for name, tensor in (source.encoded or {}).items():
        asked = head or (kind and head_kind(kind)) if name == head_name else kind
        if name in wanted and tensor.kind in (Q4_0, Q8_0) and asked in (None, tensor.kind):
            wanted[name] = tensor
        elif name in wanted and asked is None and tensor.kind.is_quantized:
            wanted |= encode_weights({name: source.weights[name]}, Q8_0, Q8_0)
    return wanted
