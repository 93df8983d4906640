from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from conftest import VOCAB
from mobillama.data.tokenizer import load_tokenizer
from mobillama.directory import save_model
from mobillama.engine.interface import OneSlot
from mobillama.engine.load import load_batch_engine, load_engine
from mobillama.engine.torch_batch import TorchBatchEngine
from mobillama.engine.torch_engine import TorchEngine
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

CONFIG = ModelConfig(VOCAB, 32, 48, 3, 2, max_position_embeddings=48)


def model_of(**shape) -> MobiLlama:
    config = dataclasses.replace(CONFIG, **shape)
    model = MobiLlama(config).eval()
    initialise(model, config, 3)
    return model


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 1, "qk_norm": True, "share": "ffn"}])
def test_whatever_is_fed_together_each_slot_gives_its_own_sequences_logits(shape):
    model, random = model_of(**shape), np.random.default_rng(0)
    batch, alone = TorchBatchEngine(model, 5), [TorchEngine(model) for _ in range(5)]
    for _ in range(60):
        slots = random.permutation(5)[: random.integers(1, 6)].tolist()
        work = []
        for slot in slots:
            if random.random() < 0.2 or batch.length(slot) > 40:  # another continuation of what is held, or a new one
                kept = int(random.integers(0, batch.length(slot) + 1)) if batch.length(slot) < 40 else 0
                batch.truncate(slot, kept)
                alone[slot].truncate(kept)
            count = 1 if random.random() < 0.7 else int(random.integers(2, 8))
            work.append((slot, random.integers(0, VOCAB, count).tolist()))
        logits = batch.feed(work)
        for row, (slot, ids) in zip(logits, work, strict=True):
            np.testing.assert_allclose(row, alone[slot].feed(ids), rtol=1e-4, atol=1e-5)
            assert batch.length(slot) == alone[slot].length


def test_a_sequence_fed_alone_gives_the_same_bits():
    model = model_of()
    batch, alone = TorchBatchEngine(model, 3), TorchEngine(model)
    for ids in ([5, 6, 7], [8], [9]):
        np.testing.assert_array_equal(batch.feed([(2, ids)])[0], alone.feed(ids))


def test_a_copied_beginning_is_that_of_the_other_slot_and_of_no_one_elses():
    model = model_of(num_key_value_heads=1)
    batch, alone = TorchBatchEngine(model, 3), TorchEngine(model)
    batch.feed([(2, [9, 9, 9, 9, 9, 9]), (0, [5, 6, 7, 8])])
    batch.feed([(2, [9])])  # its row is now the first
    for length, rest in ((3, [11, 12]), (9, [13])):
        batch.copy(0, 2, length)
        kept = [5, 6, 7, 8][:length]
        assert batch.length(2) == len(kept)
        alone.truncate(0)
        alone.feed(kept)
        np.testing.assert_allclose(batch.feed([(2, rest)])[0], alone.feed(rest), rtol=1e-4, atol=1e-5)
    alone.truncate(4)
    np.testing.assert_allclose(batch.feed([(0, [1])])[0], alone.feed([1]), rtol=1e-4, atol=1e-5)


def test_a_context_is_filled_to_its_last_place_and_not_beyond():
    engine = TorchBatchEngine(model_of(), 2, context_length=6)
    engine.feed([(0, [1, 2, 3, 4, 5]), (1, [1])])
    engine.feed([(0, [6]), (1, [2])])
    with pytest.raises(ValueError, match="6 tokens cannot hold 7"):
        engine.feed([(0, [7])])
    for work in ([], [(0, [1]), (0, [2])], [(2, [1])]):
        with pytest.raises(ValueError, match="2 slots is fed some of them, each once"):
            engine.feed(work)


def test_engines_of_several_slots_are_opened_by_path(tokenizer_path, tmp_path):
    save_model(tmp_path, CONFIG, model_of().state_dict(), load_tokenizer(tokenizer_path))
    engine, tokenizer = load_batch_engine(tmp_path, slots=3, context_length=20)
    assert (engine.slots, engine.context_length, tokenizer.vocab_size) == (3, 20, VOCAB)
    with pytest.raises(UsageError, match=r"--context: 64 tokens; .* at most 48"):
        load_batch_engine(tmp_path, slots=3, context_length=64)
    one, two = load_engine(tmp_path)[0], OneSlot(load_engine(tmp_path)[0])
    np.testing.assert_array_equal(two.feed([(0, [4, 5])])[0], one.feed([4, 5]))
    two.truncate(0, 1)
    assert two.length(0) == 1
