from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mobillama.model.cost import model_cost
from mobillama.model.transformer import MobiLlama
from mobillama.recipe import PRESETS, ModelConfig


def test_cost_of_the_paper_sizes():
    cost, base = model_cost(PRESETS["mobillama-0.5b"][0]), model_cost(PRESETS["large-base-1.2b"][0])
    assert round(cost.matmul_parameters / 1e6) == 1196
    assert round(cost.training_flops_full / 1e9, 2) == 8.28
    assert round(cost.training_flops_causal / 1e9, 2) == 7.73
    assert cost.training_flops_full == base.training_flops_full
    assert cost.applied_parameters == base.stored_parameters == base.applied_parameters
    assert cost.kv_cache_bytes_per_token * 2048 == 369_098_752
    assert round(cost.weight_bytes(4.5) / 1e6) == 301


@pytest.mark.parametrize("share", ["none", "ffn", "block"])
def test_flops_equal_what_torch_counts_in_a_real_pass(share):
    config = ModelConfig(97, 64, 96, 3, 4, 2, 24, share=share, max_position_embeddings=32)
    with torch.device("meta"):
        model = MobiLlama(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 32, dtype=torch.long))
    cost = model_cost(config)
    assert counter.get_total_flops() == 32 * (2 * cost.matmul_parameters + 2 * cost.attention_flops)


def test_generated_token_reads_the_shared_network_once():
    config = ModelConfig(97, 64, 96, 3, 4)
    cost = model_cost(config)
    matrices = 3 * 4 * 64 * 64 + 3 * 64 * 96 + 97 * 64
    assert cost.generated_token_bytes(context=0) == 2 * matrices
    assert cost.generated_token_bytes(context=10, bits=4.5) == round(4.5 / 8 * matrices) + 10 * 2 * 2 * 3 * 64
