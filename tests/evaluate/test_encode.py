"""Our encoding and scoring beside the harness's own HFLM: the same requests, the same log-probabilities, the same decisions."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import VOCAB
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.evaluate.encode import TextTokenizer, encode, to_sequences
from mobillama.evaluate.scorer import Scorer

TEXTS = [
    ("The ship sailed", [" away", " home to the harbour", " on"]),
    ("Question: who is it? \nAnswer: ", [" a man", " a woman of some fortune"]),  # a space at the end moves
    ("", ["He is tall.", "She is tall."]),
    ("word " * 80, [" short", " a long long long answer that pushes more of the context out"]),  # cut on the left
    ("one", [" x", " y", " z"]),
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(load_tokenizer(tokenizer_path), directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return built


def requests(kind: str) -> list[Instance]:
    if kind == "loglikelihood_rolling":
        texts = [" ".join(choices) + context for context, choices in TEXTS]
        return [Instance(kind, {}, (text * 5,), 0) for text in texts]
    return [Instance(kind, {}, (context, choice), n) for context, choices in TEXTS for n, choice in enumerate(choices)]


def scored(model, tokenizer, asked: list[Instance], rolling: bool = False):
    """Return the log-probability and greediness of each request, and what was truncated."""
    contexts, continuations = zip(*[("", *r.args)[-2:] for r in asked], strict=True)
    sequences, request_of, truncated = to_sequences(
        encode(tokenizer, list(contexts), list(continuations), rolling), model.config.max_position_embeddings
    )
    logprobs, greedy = [0.0] * len(asked), [True] * len(asked)
    for scores in Scorer(model, "float32", longest=64).score(sequences):
        for score in scores:
            logprobs[request_of[score.sequence]] += score.logprob
            greedy[request_of[score.sequence]] &= score.is_greedy
    return logprobs, greedy, truncated


@pytest.mark.parametrize("special_tokens", [False, True])
def test_equals_the_stock_adapter(model, tokenizer, special_tokens):
    prefix = tokenizer.bos_token_id if special_tokens else tokenizer.eos_token_id
    add_bos = None if special_tokens else False
    stock = HFLM(model, tokenizer=tokenizer, batch_size=4, add_bos_token=add_bos, prefix_token_id=prefix, device="cpu")
    ours = TextTokenizer(tokenizer, "", special_tokens)
    expected = stock.loglikelihood(requests("loglikelihood"))
    logprobs, greedy, truncated = scored(model, ours, requests("loglikelihood"))
    assert logprobs == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert greedy == [greedy for _, greedy in expected]
    assert truncated.contexts == 2 and truncated.continuations == 0
    rolling = requests("loglikelihood_rolling")
    assert scored(model, ours, rolling, True)[0] == pytest.approx(stock.loglikelihood_rolling(rolling), abs=1e-3)


def test_continuations_longer_than_the_model_are_counted(model, tokenizer):
    asked = [Instance("loglikelihood", {}, ("a", " b" * 200), 0)]
    assert scored(model, TextTokenizer(tokenizer, "", False), asked)[2].continuations == 1
