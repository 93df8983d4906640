"""The parity check measures what it says: against figures computed by torch, and against copies that are wrong on purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mobillama.data.tokenizer import load_tokenizer, token_lengths
from mobillama.deploy.parity import compare, passages, torch_logits
from mobillama.directory import load_model
from mobillama.errors import VerificationError


@pytest.fixture
def opened(small_model):
    return load_model(small_model), load_tokenizer(small_model)


def test_passages_are_real_text_of_every_source_and_as_many_as_asked(opened):
    _, tokenizer = opened
    rows = passages(tokenizer, 128, 1000)
    assert sum(len(row) - 1 for row in rows) == 1000
    assert max(map(len, rows)) == 129
    texts = ["".join(map(bytes.decode, [b"".join(tokenizer.token_bytes[i] for i in row)])) for row in rows[:5]]
    assert any("Ishmael" in text or "Chapter" in text or "CHAPTER" in text for text in texts)
    assert any("import" in text or "def " in text for text in texts)
    assert rows == passages(tokenizer, 128, 1000)


def test_figures_are_those_of_torch(opened):
    model, tokenizer = opened
    rows = passages(tokenizer, 64, 300)
    noise = torch.Generator().manual_seed(0)
    noises = [torch.randn(len(row) - 1, 512, generator=noise) * 0.3 for row in rows]
    given = iter(noises)
    parity = compare(torch_logits(model), lambda ids: torch_logits(model)(ids) + next(given).numpy(), rows, tokenizer)
    with torch.no_grad():
        ours = torch.cat([model(torch.tensor([row[:-1]]))[0] for row in rows]).double()
    theirs, targets = ours + torch.cat(noises), torch.tensor([i for row in rows for i in row[1:]])
    size = token_lengths(tokenizer)[targets.numpy()].sum()
    kl = F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="batchmean")
    assert parity.tokens == 300
    assert parity.kl_nats_per_token == pytest.approx(float(kl), rel=1e-5)
    assert parity.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert parity.max_logit_error == pytest.approx(float((ours - theirs).abs().max()), rel=1e-5)
    assert parity.mean_logit_error == pytest.approx(float((ours - theirs).abs().mean()), rel=1e-5)
    for bits, logits in ((parity.bits_per_byte_model, ours), (parity.bits_per_byte_copy, theirs)):
        nats = F.cross_entropy(logits, targets, reduction="sum")
        assert bits == pytest.approx(float(nats) / size / np.log(2), rel=1e-6)


def test_a_copy_that_computes_something_else_is_refused(opened):
    model, tokenizer = opened
    rows = passages(tokenizer, 64, 200)
    same = compare(torch_logits(model), torch_logits(model), rows, tokenizer)
    same.require("copy", 0.0)
    wrong = compare(torch_logits(model), lambda ids: np.roll(torch_logits(model)(ids), 1, 0), rows, tokenizer)
    with pytest.raises(VerificationError, match="copy: is"):
        wrong.require("copy", 0.05)
    broken = compare(torch_logits(model), lambda ids: torch_logits(model)(ids) * np.nan, rows, tokenizer)
    with pytest.raises(VerificationError, match="nan"):
        broken.require("copy", 1.0)
