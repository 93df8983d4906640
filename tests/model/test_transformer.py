from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobillama.model.attention import KVCache
from mobillama.model.cost import model_cost
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import PRESETS, ModelConfig

STORED = {
    "mobillama-0.5b": 534_865_920,
    "mobillama-0.8b": 819_315_200,
    "mobillama-0.8b-paper": 816_734_580,
    "large-base-1.2b": 1_261_529_088,
    "baseline1": 538_489_856,
    "baseline2": 542_148_608,
    "baseline3": 182_458_368,
}


def small(**changes) -> ModelConfig:
    base = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    return ModelConfig(**base | {"num_attention_heads": 4, "max_position_embeddings": 40} | changes)


def built(config: ModelConfig, seed: int = 0) -> MobiLlama:
    model = MobiLlama(config)
    initialise(model, config, seed)
    return model.eval()


SHAPES = [
    small(share="none"),
    small(share="ffn"),
    small(share="ffn", ffn_groups=2, num_key_value_heads=2),
    small(share="block", num_key_value_heads=1, head_dim=10),
    small(share="ffn", qk_norm=True, num_key_value_heads=2),
]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_store_exactly_what_the_paper_and_the_cost_model_say(name):
    config = PRESETS[name][0]
    with torch.device("meta"):
        stored = sum(parameter.numel() for parameter in MobiLlama(config).parameters())
    assert stored == model_cost(config).stored_parameters
    assert stored == STORED.get(name, stored)


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.share}-{c.ffn_groups}-{c.qk_norm}")
def test_cost_counts_every_stored_number(config):
    assert (
        sum(parameter.numel() for parameter in MobiLlama(config).parameters()) == model_cost(config).stored_parameters
    )


def test_sharing_deals_networks_to_contiguous_groups_of_layers():
    assert small(share="ffn", num_hidden_layers=5, ffn_groups=2).layer_weights == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 1),
    ]
    assert small(share="ffn").layer_weights == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert small(share="block").layer_weights == [(0, 0)] * 4
    assert small(share="none").layer_weights == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_initial_weights_are_the_same_bits_for_a_seed_and_others_for_another(config):
    torch.manual_seed(1)
    first = built(config).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in built(config).state_dict().items())
    assert not torch.equal(built(config, seed=1).lm_head.weight, first["lm_head.weight"])
    assert abs(first["model.embed_tokens.weight"].std() - 0.02) < 0.002


def test_scaled_residual_init_shrinks_only_the_projections_into_the_stream():
    plain, scaled = built(small(share="none")), built(small(share="none", scale_residual_init=True))
    ratio = {
        name: float(t.std() / plain.state_dict()[name].std()) for name, t in scaled.state_dict().items() if t.dim() == 2
    }
    for name, value in ratio.items():
        expected = 8**-0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        assert value == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("config", SHAPES, ids=str)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), max_size=4, unique=True), seed=st.integers(0, 99))
def test_cached_decoding_equals_the_full_forward(config, cuts, seed):
    model, ids = built(config), torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(seed))
    cache = KVCache(config, 2, 20)
    borders = [0, *sorted(cuts), 20]
    with torch.no_grad():
        pieces = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(borders)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-6, rtol=1e-5)


def test_truncated_cache_continues_as_if_the_rest_had_never_been():
    config = SHAPES[1]
    model, ids = built(config), torch.randint(0, 61, (1, 20))
    cache = KVCache(config, 1, 20)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.truncate(12)
        torch.testing.assert_close(model(ids[:, 12:], cache=cache), model(ids)[:, 12:], atol=1e-6, rtol=1e-5)
        with pytest.raises(ValueError, match="20 tokens cannot hold 21"):
            model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_its_rows_alone(config, side):
    model = built(config)
    rows = [torch.randint(0, 61, (length,)) for length in (3, 11, 7)]
    batch, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    place = [slice(11 - len(row), 11) if side == "left" else slice(0, len(row)) for row in rows]
    for number, (row, where) in enumerate(zip(rows, place, strict=True)):
        batch[number, where], mask[number, where] = row, 1
    with torch.no_grad():
        together = model(batch, attention_mask_bs=mask)
        for number, (row, where) in enumerate(zip(rows, place, strict=True)):
            torch.testing.assert_close(together[number, where], model(row[None])[0], atol=1e-6, rtol=1e-5)
    assert together.isfinite().all()


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_document_masked_packing_equals_documents_alone(config):
    model = built(config)
    documents = [torch.randint(0, 61, (length,)) for length in (5, 1, 9, 4)]
    packed = torch.cat(documents)[None]
    numbers = torch.cat([torch.full((len(d),), n) for n, d in enumerate(documents)])[None]
    with torch.no_grad():
        together = model(packed, document_ids=numbers)[0].split([len(d) for d in documents])
        for document, part in zip(documents, together, strict=True):
            torch.testing.assert_close(part, model(document[None])[0], atol=1e-6, rtol=1e-5)
        assert (model(packed)[0, -1] - together[-1][-1]).abs().max() > 1e-4


def test_document_ids_with_a_filled_cache_are_refused():
    config = SHAPES[1]
    model, cache, ids = built(config), KVCache(config, 1, 20), torch.zeros(1, 4, dtype=torch.long)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model(ids, cache=cache, document_ids=ids)


def test_later_tokens_never_change_earlier_logits():
    model, ids = built(SHAPES[1]), torch.randint(0, 61, (1, 20))
    changed = ids.clone()
    changed[0, 10:] = (ids[0, 10:] + 1) % 61
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :10], model(changed)[:, :10])


def test_a_tied_head_is_the_embedding_table_stored_once_and_still_tied_after_loading():
    config = small(tie_word_embeddings=True)
    model = built(config)
    state = model.state_dict()
    assert "lm_head.weight" not in state
    assert sum(tensor.numel() for tensor in state.values()) == model_cost(config).stored_parameters
    assert model_cost(small()).stored_parameters - model_cost(config).stored_parameters == 61 * 48
    with torch.device("meta"):
        loaded = MobiLlama(config)
    loaded.load_state_dict(state, assign=True)
    for twin in (loaded, copy.deepcopy(model)):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight is not model.lm_head.weight
        ids = torch.randint(0, 61, (1, 9))
        assert torch.equal(twin(ids), model(ids))
        twin.to(torch.float64)
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
