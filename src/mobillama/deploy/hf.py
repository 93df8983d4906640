"""Export to Hugging Face directories: ours with the feed-forward network once, or a plain Llama with it copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import mobillama.hf  # noqa: F401 registers the Auto classes
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.deploy.parity import compare, passages, torch_logits
from mobillama.directory import load_model, save_model
from mobillama.hf.unshare import unshare
from mobillama.record.files import new_directory, write_json

PARITY_FILE = "parity.json"
MOST_KL = 1e-6  # nats a token: the same numbers, added up in another order


def export_hf(
    source: Path, out: Path, unshared: bool, show: Callable[[str, float, float], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Write ``source`` as a Hugging Face directory, reload it with transformers, and compare logits on real text.

    Args:
        source: a model directory.
        out: the directory to make; the figures are recorded in its ``parity.json``.
        unshared: write stock Llama (the shared network copied into every layer).
        show: told the progress.

    Returns:
        What is recorded: bytes of weights, and the figures of :class:`mobillama.deploy.parity.Parity`.

    Raises:
        UsageError: ``out`` exists, or ``source`` is no model directory.
        VerificationError: the reloaded model computes something else; nothing is kept.
    """
    logging.disable_progress_bar()  # an export is one stage of ours, not four of theirs
    with new_directory(out) as work:
        model = load_model(source)
        tokenizer = load_tokenizer(source)
        if unshared:
            twin = unshare(model.state_dict(), model.model.shape)
            twin.config.bos_token_id = twin.generation_config.bos_token_id = tokenizer.bos_id
            twin.config.eos_token_id = twin.generation_config.eos_token_id = tokenizer.eos_id
            twin.save_pretrained(work)
            save_tokenizer(tokenizer, work)
        else:
            save_model(work, model.model.shape, model.state_dict(), tokenizer)
        copy = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32).eval()
        rows = passages(tokenizer, model.model.shape.max_position_embeddings)
        ours, theirs = torch_logits(model.float()), torch_logits(lambda ids: copy(ids).logits)
        parity = compare(ours, theirs, rows, tokenizer, show)
        parity.require(out, MOST_KL)
        size = sum(file.stat().st_size for file in work.glob("*.safetensors"))
        facts = {"format": "hf", "shared": not unshared, "bytes": size, "parity": parity.record()}
        write_json(work / PARITY_FILE, facts)
    return facts
