"""Export to Hugging Face directories: ours with the feed-forward network once, or a plain Llama with it copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import mobillama.hf  # noqa: F401 registers the Auto classes
from mobillama.data.tokenizer import save_tokenizer
from mobillama.deploy.parity import compare, passages, torch_logits
from mobillama.deploy.source import Source
from mobillama.directory import WEIGHTS_FILE, save_model, save_tensors
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.hf.unshare import stock_config, unshare_weights
from mobillama.progress import Show, quiet
from mobillama.record.files import new_directory, write_json

PARITY_FILE = "parity.json"
MOST_KL = 1e-6  # nats a token: the same numbers, added up in another order


def export_hf(source: Path, out: Path, unshared: bool, show: Show = quiet) -> dict[str, Any]:
    """Write ``source`` as a Hugging Face directory, reload it with transformers, and compare logits on real text.

    Args:
        source: a model directory or a GGUF file.
        out: the directory to make; the figures are recorded in its ``parity.json``.
        unshared: write stock Llama (the shared network copied into every layer).
        show: told the progress.

    Returns:
        What is recorded: bytes of weights, and the figures of :class:`mobillama.deploy.parity.Parity`.

    Raises:
        UsageError: ``out`` exists, or ``source`` is no model.
        CorruptDataError: it is damaged.
        VerificationError: the reloaded model computes something else; nothing is kept.
    """
    logging.disable_progress_bar()  # an export is one stage of ours, not four of theirs
    with new_directory(out) as work:
        opened = Source.open(source)
        if unshared:
            _save_unshared(work, opened)
        else:
            save_model(work, opened.shape, opened.weights, opened.tokenizer)
        copy = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32).eval()
        rows = passages(opened.tokenizer, opened.shape.max_position_embeddings)
        ours, theirs = torch_logits(opened.model()), torch_logits(lambda ids: copy(ids).logits)
        parity = compare(ours, theirs, rows, opened.tokenizer, show)
        parity.require(out, MOST_KL)
        size = sum(file.stat().st_size for file in work.glob("*.safetensors"))
        facts = {"format": "hf", "shared": not unshared, "bytes": size, "parity": parity.record()}
        write_json(work / PARITY_FILE, facts)
    return facts


def _save_unshared(directory: Path, source: Source) -> None:
    """Write what ``save_pretrained`` of the unshared twin would, each copy straight from the one weight."""
    config = stock_config(source.shape)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = source.weights[EMBEDDING].dtype
    config.bos_token_id, config.eos_token_id = source.tokenizer.bos_id, source.tokenizer.eos_id
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    weights = unshare_weights(source.weights, source.shape)
    if source.shape.tie_word_embeddings:
        del weights[HEAD]
    save_tensors(directory / WEIGHTS_FILE, weights)
    save_tokenizer(source.tokenizer, directory)
