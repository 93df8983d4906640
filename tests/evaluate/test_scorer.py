"""Scores of packed rows equal those of a model run on each sequence alone, whatever the architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from mobillama.errors import UsageError
from mobillama.evaluate.scorer import Scorer
from mobillama.evaluate.tree import Sequence
from mobillama.hf import MobiLlamaConfig, MobiLlamaForCausalLM

VOCAB = 300
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
NEOX = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "word_embed_proj_dim": 16,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "attention_types": [[["global", "local"], 1]],
    "num_layers": 2,
    "num_heads": 2,
    "max_position_embeddings": 512,
    "window_size": 64,
}
GEMMA = {**LLAMA, "head_dim": 16, "final_logit_softcapping": 3.0}
ARCHITECTURES = {
    "mobillama": (MobiLlamaForCausalLM, MobiLlamaConfig, {**LLAMA, "num_key_value_heads": 4, "share": "ffn"}, True),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA, True),
    "pythia": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, NEOX, True),
    "opt, learned positions, projected": (transformers.OPTForCausalLM, transformers.OPTConfig, OPT, True),
    "gpt2, learned positions": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2, True),
    "gemma2, capped logits": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, GEMMA, True),
    # Local attention counts places in the row, ALiBi takes no positions, a state space model no mask.
    "gpt-neo, local attention": (transformers.GPTNeoForCausalLM, transformers.GPTNeoConfig, NEO, False),
    "bloom, ALiBi": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig,
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        False,
    ),
    "mistral, sliding window": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {**LLAMA, "sliding_window": 32},
        False,
    ),
    "mamba": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig,
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
        False,
    ),
}


def questions() -> list[Sequence]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(6):
        context = random.integers(0, VOCAB, random.integers(20, 200))
        for length in random.integers(1, 12, 4):
            ids = np.concatenate([context, random.integers(0, VOCAB, length)]).astype(np.int32)
            found.append(Sequence(ids, int(length)))
    return found


def alone(model, sequence: Sequence) -> tuple[float, bool]:
    logits = model(torch.from_numpy(sequence.inputs).long()[None]).logits[0, -sequence.scored :].float()
    targets = torch.from_numpy(sequence.ids[-sequence.scored :]).long()
    logprob = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(logprob), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_those_of_each_sequence_alone(name):
    cls, config, settings, packs = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = cls(config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)  # as decided as a trained model
        sequences = questions()
        expected = [alone(model, sequence) for sequence in sequences]
    scorer = Scorer(model, "float32", longest=255)
    assert scorer.packs == packs
    found = {score.sequence: score for part in scorer.score(sequences) for score in part}
    assert len(found) == len(sequences)
    for index, (logprob, is_greedy) in enumerate(expected):
        assert found[index].logprob == pytest.approx(logprob, abs=1e-4)
        assert found[index].is_greedy == is_greedy
    if packs:
        assert scorer.tokens < sum(len(sequence.ids) for sequence in sequences) / 2


def test_what_is_longer_than_was_tried_out_is_read_one_a_row():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    sequences = questions()
    packed, unpacked = Scorer(model, "float32", longest=300), Scorer(model, "float32", longest=50)
    scores = [
        {s.sequence: s.logprob for part in scorer.score(sequences) for s in part} for scorer in (packed, unpacked)
    ]
    assert unpacked.packs and unpacked.tokens > packed.tokens
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    sequences = questions()
    exact = {s.sequence: s.logprob for part in Scorer(model, "float32", 255).score(sequences) for s in part}
    rough = {s.sequence: s.logprob for part in Scorer(model, "bfloat16", 255).score(sequences) for s in part}
    assert next(model.parameters()).dtype == torch.bfloat16
    assert rough == pytest.approx(exact, rel=0.02)


def test_when_memory_runs_out_batches_are_halved_and_nothing_is_lost(monkeypatch):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    monkeypatch.setattr("mobillama.evaluate.scorer.ROW_TOKENS", 128)
    scorer = Scorer(model, "float32", 255, batch_tokens=4096)
    expected = {s.sequence: s.logprob for part in scorer.score(questions()) for s in part}
    computed = Scorer._logits

    def logits(self, batch, packs):
        if batch.tokens > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return computed(self, batch, packs)

    memory = 520
    monkeypatch.setattr(Scorer, "_logits", logits)
    found = {s.sequence: s.logprob for part in scorer.score(questions()) for s in part}
    assert found == pytest.approx(expected, abs=1e-4) and scorer.batch_tokens < 4096
    memory = 20
    with pytest.raises(UsageError, match=r"memory does not hold a row of [\d,]+ tokens"):
        list(scorer.score(questions()))


def by_precision(model, sequences) -> tuple[dict[int, float], dict[int, float]]:
    exact, rough = (
        {s.sequence: s.logprob for part in Scorer(model, name, 255).score(sequences) for s in part}
        for name in ("float32", "bfloat16")
    )
    return exact, rough


@pytest.mark.parametrize("name", ["mobillama", "llama", "gemma2, capped logits", "gpt2, learned positions"])
def test_bfloat16_logits_are_as_fine_as_float32(name, monkeypatch):
    """One-token choices behind one context, with logits so great that bfloat16 itself has steps of 1/8."""
    monkeypatch.setattr("mobillama.evaluate.scorer._HEAD_PIECE", 32 * 50)  # several pieces of the vocabulary
    cls, config, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    more = {"tie_word_embeddings": True} | ({"final_logit_softcapping": 30.0} if "capped" in name else {})
    model = cls(config(**settings | more)).eval()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.normal_(0, 0.3).add_(4 * torch.nn.functional.normalize(torch.randn(32), dim=0))
        if model.config.model_type == "gpt2":
            model.transformer.ln_f.bias.normal_(0, 3)
    sequences = [Sequence(np.array([5, 6, 7, choice], np.int32), 1) for choice in range(VOCAB)]
    exact, rough = by_precision(model, sequences)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(set(rough.values())) > 0.98 * VOCAB
    assert np.corrcoef([exact[i] for i in exact], [rough[i] for i in exact])[0, 1] > 0.999


def test_the_heads_bias_counts_and_others_still_get_bfloat16():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    model.lm_head = torch.nn.Linear(32, VOCAB)
    with torch.no_grad():
        model.lm_head.bias.normal_(0, 5)
    exact, rough = by_precision(model, questions())
    assert rough == pytest.approx(exact, rel=0.02)
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
