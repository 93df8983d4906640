from __future__ import annotations

import numpy as np
import onnx
import pytest

from mobillama.deploy.onnx_graph import INT8_ACTIVATIONS
from mobillama.engine.blocks import Q4_0, Q8_0
from mobillama.engine.onnx_engine import OnnxEngine
from onnx_support import logits_of, model_and_graph

SHAPES = {
    "mobillama": {},
    "two groups": {"ffn_groups": 2},
    "dense": {"share": "none"},
    "one block": {"share": "block"},
    "grouped heads": {"num_key_value_heads": 2, "share": "none", "rope_theta": 1e5},
    "tied head": {"tie_word_embeddings": True},
    "normed heads": {"qk_norm": True},
    "wide heads": {"head_dim": 32, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_float32_the_graph_computes_what_the_model_computes(tmp_path, shape):
    model = model_and_graph(tmp_path, **shape)
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    logits = OnnxEngine.load(tmp_path, threads=1).feed_each(ids)
    np.testing.assert_allclose(logits, logits_of(model, ids), atol=2e-5)


@pytest.mark.parametrize("kinds", [(Q8_0, Q8_0), (Q4_0, Q8_0)])
def test_eight_bits_are_taken_over_exactly_too(tmp_path, kinds):
    model = model_and_graph(tmp_path, *kinds)
    ids = list(range(40))
    logits = OnnxEngine.load(tmp_path, threads=1).feed_each(ids)
    np.testing.assert_allclose(logits, logits_of(model, ids), atol=2e-5)


def test_activations_of_eight_bits_cost_little(tmp_path):
    model = model_and_graph(tmp_path, activations=INT8_ACTIVATIONS)
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    expected = logits_of(model, ids)
    logits = OnnxEngine.load(tmp_path, threads=1).feed_each(ids)
    assert 1e-4 < np.abs(logits - expected).mean() / np.abs(expected).mean() < 0.05


def test_what_layers_share_stands_once_in_the_file_and_is_named_by_each(tmp_path):
    for share in ("ffn", "none"):
        (tmp_path / share).mkdir()
        model_and_graph(tmp_path / share, share=share)
    graph = onnx.load(tmp_path / "ffn" / "model.onnx", load_external_data=False).graph
    users = [node for node in graph.node if "model.ffns.0.down_proj/codes" in node.input]
    assert len(users) == 3
    assert sum("ffns" in tensor.name and "codes" in tensor.name for tensor in graph.initializer) == 2
    sizes = {share: (tmp_path / share / "model.onnx.data").stat().st_size for share in ("ffn", "none")}
    assert sizes["none"] - sizes["ffn"] > 2 * 3 * 64 * 96 * 0.5
    memory = {share: OnnxEngine.load(tmp_path / share).memory for share in sizes}
    two_networks = 2 * 3 * 64 * 96 * (4 + 16 / 32) / 8  # 4 bits each, and a float16 scale for every 32
    assert memory["none"].read_per_token - memory["ffn"].read_per_token == two_networks


def test_a_tied_head_and_the_embedding_table_are_the_same_bytes(tmp_path):
    model_and_graph(tmp_path, tie_word_embeddings=True)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.name.startswith("embed_tokens")
    }
    assert places["embed_tokens/codes"] == places["embed_tokens/rows"]


def test_equal_models_give_equal_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        model_and_graph(tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
