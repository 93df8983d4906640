from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from conftest import VOCAB
from mobillama.data.tokenizer import load_tokenizer
from mobillama.deploy.gguf import export_gguf
from mobillama.directory import load_model, read_config, save_model
from mobillama.engine.load import load_batch_engine, load_engine
from mobillama.engine.sampling import Sampling, sample
from mobillama.engine.stream import Session, stream_tokens, text_of
from mobillama.engine.torch_engine import OneTokenStep
from mobillama.errors import CorruptDataError, DivergedError, UsageError
from mobillama.model.attention import KVCache
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

CONFIG = ModelConfig(VOCAB, 32, 48, 3, 2, max_position_embeddings=48)


@pytest.fixture
def directory(tokenizer_path, tmp_path):
    model = MobiLlama(CONFIG)
    initialise(model, CONFIG, 3)
    save_model(tmp_path / "model", CONFIG, model.state_dict(), load_tokenizer(tokenizer_path))
    return tmp_path / "model"


def test_fed_piecewise_or_whole_the_logits_are_those_of_the_model(directory):
    engine, _ = load_engine(directory)
    ids = torch.randint(0, VOCAB, (20,)).tolist()
    engine.feed(ids[:7])
    engine.feed([ids[7]])
    logits = engine.feed(ids[8:])
    with torch.no_grad():
        expected = load_model(directory)(torch.tensor([ids]))[0, -1].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert engine.length == 20
    engine.truncate(8)
    np.testing.assert_allclose(engine.feed(ids[8:]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="48 tokens cannot hold"):
        engine.feed([1] * 29)
    with pytest.raises(ValueError, match="at least one"):
        engine.feed([])
    with pytest.raises(ValueError, match="0…511"):
        engine.feed([VOCAB])
    engine.truncate(8)
    each = engine.feed_each(ids[8:])
    assert each.shape == (12, VOCAB)
    np.testing.assert_allclose(each[-1], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 1, "qk_norm": True}])
def test_a_step_on_fixed_tensors_is_the_models_step(shape):
    config = dataclasses.replace(CONFIG, **shape)
    model = MobiLlama(config).eval()
    initialise(model, config, 3)
    ids = torch.randint(0, VOCAB, (1, 30))
    cache = KVCache(config, 1, 48)
    step = OneTokenStep(model, cache, span=32)
    with torch.no_grad():
        expected = model(ids)[0]
        model(ids[:, :20], cache=cache)
        for place in range(20, 30):
            step.token_11[:] = ids[:, place]
            step.position_11[:] = place
            np.testing.assert_allclose(step(), expected[place], atol=1e-5)
            cache.extend(1)
    assert cache.get_seq_length() == 30


def test_session_computes_only_what_is_new(directory):
    engine, _ = load_engine(directory)
    fed: list[int] = []
    feed = engine.feed
    engine.feed = lambda ids: fed.append(len(ids)) or feed(ids)
    session = Session(engine)
    first = session.set([5, 6, 7, 8])
    session.append(9)
    session.set([5, 6, 7, 8, 10, 11])
    np.testing.assert_allclose(session.set([5, 6, 7, 8]), first, atol=1e-6)
    assert fed == [4, 1, 2, 1]


def test_greedy_stream_is_the_models_own_continuation_and_stops_at_each_limit(directory):
    engine, tokenizer = load_engine(directory)
    model, ids = load_model(directory), [5, 6, 7]
    for _ in range(10):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    expected = b"".join(tokenizer.token_bytes[i] for i in ids[3:]).decode("utf-8", errors="replace")

    def greedy(max_tokens: int, eos_id: int) -> list[int]:
        return list(
            stream_tokens(Session(engine), [5, 6, 7], {eos_id}, Sampling(0), max_tokens, np.random.default_rng(0))
        )

    assert greedy(10, eos_id=-1) == ids[3:]
    assert "".join(text_of(ids[3:], tokenizer)) == expected
    assert len(greedy(1000, eos_id=-1)) == 48 - 3 + 1  # the context's room, and the token that it predicts
    assert greedy(1000, eos_id=ids[5]) == ids[3 : 3 + ids[3:].index(ids[5])]


def test_streamed_characters_of_several_tokens_arrive_whole(directory):
    _, tokenizer = load_engine(directory)
    tokens = [tokenizer.token_bytes.index(bytes([byte])) for byte in "é🦙".encode()]
    assert [piece for piece in text_of(tokens, tokenizer) if piece] == ["é", "🦙"]
    assert "".join(text_of(tokens[:3], tokenizer)) == "é\ufffd"


@pytest.mark.parametrize("step", ["set", "append"])
def test_an_interrupted_session_goes_on_with_what_it_surely_holds(directory, step):
    engine, _ = load_engine(directory)
    session, feed = Session(engine), engine.feed
    session.set([1, 2, 3, 4])

    def interrupted(ids):
        feed(ids)
        raise KeyboardInterrupt

    engine.feed = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.set([1, 2, 9, 9, 9]) if step == "set" else session.append(5)
    engine.feed = feed
    fresh, _ = load_engine(directory)
    np.testing.assert_allclose(session.set([1, 2, 3, 5, 6]), fresh.feed([1, 2, 3, 5, 6]), atol=1e-6)
    assert engine.length == 5


def test_sampling_draws_by_probability_within_top_k_and_top_p():
    random = np.random.default_rng(0)
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))

    def frequencies(**options):
        drawn = [sample(logits, Sampling(**options), random) for _ in range(4000)]
        return np.bincount(drawn, minlength=5) / 4000

    np.testing.assert_allclose(frequencies(temperature=1, top_p=1), [0.5, 0.2, 0.15, 0.1, 0.05], atol=0.03)
    np.testing.assert_allclose(frequencies(temperature=1, top_p=1, top_k=2), [5 / 7, 2 / 7, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(
        frequencies(temperature=1, top_p=0.8), np.array([0.5, 0.2, 0.15, 0, 0]) / 0.85, atol=0.03
    )
    squared = np.array([0.25, 0.04, 0.0225, 0.01, 0.0025])
    np.testing.assert_allclose(frequencies(temperature=0.5, top_p=1), squared / squared.sum(), atol=0.03)
    assert frequencies(temperature=0)[0] == 1
    assert frequencies(temperature=1, top_p=0.01)[0] == 1


@pytest.mark.parametrize("options", [{"top_p": 1}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 50.0])
def test_draws_from_a_large_vocabulary_are_those_of_one_sorted_sum(options, temperature):
    random = np.random.default_rng(2)
    for seed in range(40):
        logits = random.normal(0, 4, size=3000).astype(np.float32)
        weights = np.exp((logits - logits.max()) / temperature).astype(np.float64)
        ranked = np.argsort(-weights, kind="stable") if options["top_p"] < 1 else np.arange(3000)
        kept = np.searchsorted(np.cumsum(weights[ranked]), options["top_p"] * weights.sum()) + 1
        ranked = [i for i in ranked[:kept] if weights[i] >= options.get("min_p", 0)]
        sums = np.cumsum(weights[ranked])
        expected = ranked[np.searchsorted(sums, np.random.default_rng(seed).random() * sums[-1], side="right")]
        assert sample(logits, Sampling(temperature, **options), np.random.default_rng(seed)) == expected


def test_min_p_keeps_what_is_likely_enough_and_the_penalty_makes_the_seen_rarer():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)
    assert {sample(logits, Sampling(1, 0, 1, min_p=0.4), random) for _ in range(200)} == {0, 1}
    assert {sample(logits, Sampling(1, 0, 1, min_p=1), random) for _ in range(20)} == {0}
    signed = np.array([2.0, 1.5, -0.1, -3.0], np.float32)
    assert sample(signed, Sampling(0, repetition_penalty=1.2), random, [0, 0, 3]) == 0  # 2 / 1.2 is above 1.5
    assert sample(signed, Sampling(0, repetition_penalty=1.4), random, [0]) == 1
    assert sample(-signed - 4, Sampling(0, repetition_penalty=9), random, [3]) == 2  # negative ones are multiplied
    assert sample(signed, Sampling(1e-30, 0, 1), random) == 0


def test_a_context_is_chosen_and_one_that_fits_no_memory_is_told(directory, tmp_path):
    engine, _ = load_engine(directory, context_length=20)
    assert engine.context_length == 20 and engine.memory.cache == load_engine(directory)[0].memory.cache * 20 // 48
    with pytest.raises(UsageError, match=r"--context: 49 tokens; .* at most 48"):
        load_engine(directory, context_length=49)
    config = directory / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 48', '"max_position_embeddings": 2147483647')
    )
    export_gguf(directory, tmp_path / "m.gguf", None)
    for load in (
        lambda context: load_engine(directory, context_length=context),
        lambda context: load_batch_engine(directory, 2, context_length=context),
        lambda context: load_engine(tmp_path / "m.gguf", "torch", context_length=context),
        lambda context: load_engine(tmp_path / "m.gguf", context_length=context),
    ):
        with pytest.raises(
            UsageError, match=r"context of 2,147,483,647 tokens does not fit the memory; give --context"
        ):
            load(0)
        assert load(30)[0].context_length == 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(directory):
    with pytest.raises(UsageError, match=r"--device: cuda is asked for, but torch sees no GPU"):
        load_engine(directory, device="cuda")
    with pytest.raises(UsageError, match=r"--device: cuda"):
        load_batch_engine(directory, 2, device="cuda")


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_sampling_that_is_no_number_is_refused(field):
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(UsageError, match=field.replace("_", "-")):
            Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("logits", [[0.0, np.nan, 1.0], [-np.inf, -np.inf, -np.inf], [0.0, np.inf, 1.0]])
def test_nothing_is_drawn_from_logits_that_are_not_finite(logits, temperature):
    with pytest.raises(DivergedError, match="take another checkpoint"):
        sample(np.array(logits, np.float32), Sampling(temperature), np.random.default_rng(0))


def test_impossible_sampling_and_directories_are_named(directory, tmp_path):
    for options, said in (({"temperature": -1}, "temperature"), ({"top_p": 0}, "top-p"), ({"top_k": -1}, "top-k")):
        with pytest.raises(UsageError, match=said):
            Sampling(**options)
    with pytest.raises(UsageError, match="no model directory"):
        load_engine(tmp_path)
    with pytest.raises(UsageError, match="none: no such directory"):
        read_config(tmp_path / "none")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptDataError, match=r"model\.safetensors: damaged or truncated"):
        load_engine(directory)
    weights.unlink()
    with pytest.raises(CorruptDataError, match="missing"):
        load_engine(directory)
