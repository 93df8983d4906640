"""Export to ExecuTorch: a program for phones that holds the shared network once."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mobillama.data.tokenizer import JSON_FILE, MODEL_FILE, SentencePieceTokenizer, Tokenizer, save_tokenizer
from mobillama.deploy.executorch_program import (
    MOST_TOKENS,
    Program,
    Rounded,
    load_operators,
    round_activations,
    write_program,
)
from mobillama.deploy.gguf import record_of
from mobillama.deploy.parity import compare, passages, recorded, torch_logits
from mobillama.deploy.source import Source, check_memory, refuse_existing, with_context
from mobillama.engine.blocks import BLOCK, Q4_0
from mobillama.engine.torch_gguf import encode_weights
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.errors import UsageError
from mobillama.progress import Show, quiet
from mobillama.recipe import ModelConfig
from mobillama.record.files import replaced_file, write_json

# How far from torch on the same numbers a sum in another order may be, and how often as far as torch itself is once it rounds
# activations as XNNPACK does. Token for token the two cannot be held together: rounding makes a last bit a whole step, and the
# layers carry that on, so that on SmolLM2-135M torch's own float32 and float64 are then as far apart as rounded and whole.
# A mean over passages is within a tenth of that; the few predictions after prompts scatter up to ten times as far.
_EXACT_KL, _MOST_OF_ROUNDING, _MOST_AFTER_PROMPTS = 1e-5, 1.5, 10
_MOST_ROUNDING_KL = 0.1  # what activations of eight bits may cost
_LESS_TOP1 = 0.1  # than torch's, once it rounds

Rows = Sequence[Sequence[int]]
Passages = list[NDArray[np.float32]]


def export_executorch(
    source: Path,
    out: Path,
    kind: str = "8da4w",
    context: int | None = None,
    tokens: int = 1024,
    show: Show = quiet,
) -> dict[str, Any]:
    """Write a model as a program of ExecuTorch, run it with ExecuTorch, and compare it with the model on real text.

    The program must compute what torch computes with the numbers that it holds, up to what rounding activations explains, which
    is measured in torch. How far the program is from the model is recorded.

    Args:
        source: a model directory or a GGUF file.
        out: the ``.pte`` file to make; the figures are recorded beside it as ``OUT.json``, and ``OUT.tokenizer.model`` or
            ``.json`` is the tokenizer, as ExecuTorch's runners take it.
        kind: of matrices: ``8da4w`` (4 bits in groups of 32, activations rounded to 8 bits; the head has 8) or ``float32``.
        context: tokens that the cache has places for; None: as the model was made for.
        tokens: predictions that are compared.
        show: told the progress.

    Returns:
        What is recorded: types, bytes, and the figures of :class:`mobillama.deploy.parity.Parity`.

    Raises:
        ModuleNotFoundError: ExecuTorch is not installed.
        UsageError: there is something at ``out`` or beside it, ``source`` is no model, its rows are no whole number of
            groups, or it does not bear activations of eight bits.
        VerificationError: the program computes something else than rounding explains; nothing is kept.
    """
    load_operators()
    opened = Source.open(source)
    record, words = record_of(out), out.with_name(f"{out.name}.{_tokenizer_file(opened.tokenizer)}")
    refuse_existing(out, record, words)
    shape = with_context(opened.shape, context)
    check_memory(source, shape)
    if kind == "8da4w":
        _check_rows(source, shape)
        weights = _rounded(opened, out)
    else:
        weights = {name: weight.float() for name, weight in opened.weights.items()}
    with replaced_file(out) as work:
        show("lower to XNNPACK", 0, 1)
        write_program(work, shape, weights, _stated(opened.tokenizer))
        show("lower to XNNPACK", 1, 1)
        rows = passages(opened.tokenizer, min(shape.max_position_embeddings, MOST_TOKENS), tokens)
        given, after_prompts = _run(Program(work), rows, show)
        numbers = {name: its.numbers() if isinstance(its, Rounded) else its for name, its in weights.items()}
        model = dataclasses.replace(opened, weights=numbers).model()
        expected = list(map(torch_logits(model), (row[:-1] for row in rows)))
        if kind == "8da4w":
            round_activations(model)
        rounding = compare(recorded(expected), torch_logits(model), rows, opened.tokenizer)
        explained = rounding.kl_nats_per_token
        if explained > _MOST_ROUNDING_KL:
            raise UsageError(
                f"--type 8da4w: activations of eight bits cost this model {explained:.2f} nats/token; take --type float32"
            )
        computed = compare(recorded(expected), recorded(given), rows, opened.tokenizer)
        computed.require(out, _EXACT_KL + _MOST_OF_ROUNDING * explained, rounding.top1_agreement - _LESS_TOP1)
        ends, last = [row[-2:] for row in rows], (logits_tv[-1:] for logits_tv in expected)
        after = compare(recorded(last), recorded(after_prompts), ends, opened.tokenizer)
        after.require(out, _EXACT_KL + _MOST_AFTER_PROMPTS * explained)
        parity = compare(torch_logits(opened.model()), recorded(given), rows, opened.tokenizer)
        facts = {
            "model": opened.name,
            "format": "executorch",
            "shared": shape.share != "none",
            "type": kind,
            "head": "float32" if kind == "float32" else "int8",
            "context": shape.max_position_embeddings,
            "bytes": work.stat().st_size,
            "parity": parity.record(),
            "parity_on_the_same_numbers": computed.record(),
            "rounding_of_activations_in_torch": rounding.record(),
        }
        _write_tokenizer(opened.tokenizer, words)
    write_json(record, facts)
    return facts


def _check_rows(source: Path, shape: ModelConfig) -> None:
    for width in (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.attention_head_dim):
        if width % BLOCK:
            raise UsageError(
                f"{source}: has rows of {width} numbers, no whole number of groups of {BLOCK}; give --type float32"
            )


def _rounded(source: Source, place: Path) -> dict[str, Tensor | Rounded]:
    """Return all weights as the program holds them; codes of Q4_0 matrices are taken over."""
    head = EMBEDDING if source.shape.tie_word_embeddings else HEAD
    wanted = {name: weight for name, weight in source.weights.items() if weight.dim() == 2 and name != head}
    blocks = encode_weights(wanted, Q4_0, Q4_0)
    kept = {name: its for name, its in (source.encoded or {}).items() if name in blocks and its.kind == Q4_0}
    blocks = source.checked(blocks | kept, place)
    weights: dict[str, Tensor | Rounded] = {name: its.float() for name, its in source.weights.items() if its.dim() == 1}
    weights[head] = Rounded.by_row(source.weights[head])
    for name, tensor in blocks.items():
        rounded = Rounded.of_blocks(tensor.rows)
        weights[name] = rounded if name == EMBEDDING else rounded.with_positive_scales()
    return weights


def _stated(tokenizer: Tokenizer) -> dict[str, Any]:
    bos = {} if tokenizer.bos_id is None else {"get_bos_id": tokenizer.bos_id}
    return {"get_eos_ids": [tokenizer.eos_id], **bos}


def _run(program: Program, rows: Rows, show: Show) -> tuple[Passages, Passages]:
    """Return the logits (t, v) of each passage, decoded token by token, and those (1, v) that follow it as one prompt."""
    given, after_prompts = [], []
    for done, row in enumerate(rows, 1):
        given.append(np.stack([program.feed([token], place) for place, token in enumerate(row[:-1])]))
        after_prompts.append(program.feed(row[:-1], 0)[None])
        show("run passages", done, len(rows))
    return given, after_prompts


def _tokenizer_file(tokenizer: Tokenizer) -> str:
    """Return the name of the file that ExecuTorch's runners take.

    They read a ``tokenizer.json`` too, but put out its pieces one by one without the space before a word.
    """
    return MODEL_FILE if isinstance(tokenizer, SentencePieceTokenizer) else JSON_FILE


def _write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, replaced_file(path) as work:
        save_tokenizer(tokenizer, Path(folder))
        shutil.copyfile(Path(folder) / _tokenizer_file(tokenizer), work)
