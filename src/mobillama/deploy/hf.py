"""Export to Hugging Face directories: ours with the feed-forward network once, or a plain Llama with it copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import mobillama.hf  # noqa: F401 registers the Auto classes
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.directory import load_model, save_model
from mobillama.errors import VerificationError
from mobillama.hf.unshare import unshare
from mobillama.record.files import new_directory

TOLERANCE = 1e-4


def export_hf(source: Path, out: Path, unshared: bool) -> dict[str, Any]:
    """Write ``source`` as a Hugging Face directory, reload it with transformers, and compare logits.

    Args:
        unshared: write stock Llama (the shared network copied into every layer).

    Returns:
        File size in bytes, the largest logit difference, and the share of equal likeliest tokens.

    Raises:
        UsageError: ``out`` exists, or ``source`` is no model directory.
        VerificationError: the reloaded model computes something else.
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
        parity = _parity(model, work)
    return {"bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")), **parity}


@torch.no_grad()
def _parity(model: torch.nn.Module, directory: Path) -> dict[str, float]:
    reloaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    vocab_size = reloaded.config.vocab_size
    ids = torch.randint(0, vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids).float(), reloaded(ids).logits.float()
    error = float((ours - theirs).abs().max())
    if not error <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise VerificationError(f"{directory}: logits of the reloaded export differ by {error}; please report this")
    return {"max_logit_error": error, "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())}
