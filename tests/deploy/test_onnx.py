"""Exports to ONNX Runtime: parity on real text, codes of a quantized source, what cannot be exported."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from conftest import VOCAB, directory_of, run_cli
from mobillama.deploy.gguf import export_gguf
from mobillama.deploy.onnx import export_onnx
from mobillama.engine.blocks import Q4_0, Q4_1, Q8_0
from mobillama.engine.gguf_model import read_model
from mobillama.engine.load import load_engine
from mobillama.engine.torch_engine import TorchEngine
from mobillama.engine.torch_gguf import load_gguf
from mobillama.errors import UsageError, VerificationError


def test_an_export_is_compared_recorded_and_opened(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model")
    facts = export_onnx(source, tmp_path / "out", Q8_0)
    assert facts == json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["types"] == ["Q8_0"] and facts["cache"] == "int8" and facts["shared"]
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("model.onnx*"))
    assert facts["parity"]["tokens"] == 1024 and facts["parity"]["kl_nats_per_token"] < 1e-3
    assert 0 < facts["parity_on_the_same_numbers"]["kl_nats_per_token"] < 1e-3
    engine, tokenizer = load_engine(tmp_path / "out", threads=1)
    assert engine.name == "onnxruntime" and tokenizer.vocab_size == VOCAB
    original, _ = load_engine(source)
    (ids,) = tokenizer.encode(["The ship was old, and the captain slept."])
    assert np.abs(engine.feed(ids) - original.feed(ids)).mean() < 0.02
    with pytest.raises(UsageError, match="exists already"):
        export_onnx(source, tmp_path / "out")


@pytest.mark.parametrize("kind", [Q4_0, Q8_0, Q4_1], ids=lambda kind: kind.name)
def test_codes_of_a_quantized_source_survive(kind, tokenizer_path, tmp_path):
    gguf = tmp_path / "m.gguf"
    export_gguf(directory_of(tokenizer_path, tmp_path / "model"), gguf, kind)
    facts = export_onnx(gguf, tmp_path / "out", int8_cache=False)
    # Q4_1 has a minimum for each block, which the products know not: its numbers are kept in eight bits.
    assert facts["types"] == [Q8_0.name if kind is Q4_1 else kind.name] and facts["head"] == "Q8_0"
    model = onnx.load(tmp_path / "out" / "model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensor = read_model(gguf).tensors["model.layers.0.self_attn.o_proj.weight"]
    if kind is not Q4_1:
        scales = tensor.rows.reshape(64, 2, -1)[:, :, :2].copy().view(np.float16)[..., 0]
        np.testing.assert_array_equal(stored["model.layers.0.self_attn.o_proj/scales_half"], scales)
    engine, tokenizer = load_engine(tmp_path / "out", threads=1)
    same_numbers = TorchEngine(load_gguf(gguf, torch.float32)[0])
    (ids,) = tokenizer.encode(["The king gave them two horses."])
    assert np.abs(engine.feed(ids) - same_numbers.feed(ids)).mean() < 0.02


def test_with_float32_activations_and_cache_nothing_but_the_weights_is_rounded(tokenizer_path, tmp_path):
    gguf = tmp_path / "m.gguf"
    export_gguf(directory_of(tokenizer_path, tmp_path / "model"), gguf, Q4_0)
    facts = export_onnx(gguf, tmp_path / "out", int8_cache=False, int8_activations=False, context=64, tokens=100)
    assert facts["parity"]["max_logit_error"] < 1e-4 and facts["parity"]["top1_agreement"] == 1
    assert facts["context"] == load_engine(tmp_path / "out")[0].context_length == 64
    for context in (1, 129):
        with pytest.raises(UsageError, match=r"not within 2…128"):
            export_onnx(gguf, tmp_path / "other", context=context)


def test_head_and_cache_are_chosen(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model", tie_word_embeddings=True, num_key_value_heads=2)
    facts = export_onnx(source, tmp_path / "wide", int8_cache=False, tokens=100)
    assert (facts["types"], facts["head"], facts["cache"]) == (["Q4_0", "Q8_0"], "Q8_0", "float32")
    facts = export_onnx(source, tmp_path / "narrow", head=Q4_0, tokens=100)
    assert (facts["types"], facts["head"], facts["cache"]) == (["Q4_0"], "Q4_0", "int8")


def test_a_wide_head_is_rounded_anew_in_longer_blocks_which_costs_next_to_nothing(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model", hidden_size=128)
    logits, ids = {}, list(range(5, 60))
    for head in (Q8_0, Q4_0):
        export_onnx(source, tmp_path / head.name, Q8_0, head, int8_cache=False, tokens=100)
        engine, _ = load_engine(tmp_path / head.name, threads=1)
        logits[head.name] = engine.feed_each(ids)
    original = load_engine(source)[0].feed_each(ids)
    graph = onnx.load(tmp_path / "Q8_0" / "model.onnx", load_external_data=False).graph
    (product,) = (node for node in graph.node if node.output[0] == "logits")
    assert {its.name: its.i for its in product.attribute}["block_size"] == 128
    errors = {name: np.abs(its - original).mean() for name, its in logits.items()}
    assert errors["Q8_0"] < 0.5 * errors["Q4_0"]  # what is left is rounded activations


def test_eight_bit_caches_cost_little_and_take_a_quarter(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model")
    engines = {}
    for name in ("int8", "float32"):
        export_onnx(source, tmp_path / name, Q8_0, int8_cache=name == "int8", tokens=100)
        engines[name] = load_engine(tmp_path / name, threads=1)[0]
    assert engines["int8"].memory.cache * 4 == engines["float32"].memory.cache
    ids = np.random.default_rng(0).integers(3, VOCAB, 100).tolist()
    logits = {name: engine.feed_each(ids) for name, engine in engines.items()}
    assert 0 < np.abs(logits["int8"] - logits["float32"]).mean() < 0.02
    engines["int8"].truncate(40)
    np.testing.assert_allclose(engines["int8"].feed(ids[40:]), logits["int8"][-1], atol=0.05)


def test_what_the_runtime_cannot_compute_is_refused_by_name(tokenizer_path, tmp_path):
    for changes, said in (
        ({"head_dim": 24}, "heads of width 24"),
        ({"intermediate_size": 100}, "rows of 100 numbers"),
        ({"hidden_size": 48, "head_dim": 16}, "rows of 48"),
    ):
        source = directory_of(tokenizer_path, tmp_path / said, **changes)
        with pytest.raises(UsageError, match=said):
            export_onnx(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else_is_not_kept(tokenizer_path, tmp_path, monkeypatch):
    source = directory_of(tokenizer_path, tmp_path / "model", num_hidden_layers=2)
    from mobillama.deploy import onnx_graph

    right = onnx_graph._rotary_tables
    monkeypatch.setattr(onnx_graph, "_rotary_tables", lambda config: right(config)[::-1])
    with pytest.raises(VerificationError, match="nats/token"):
        export_onnx(source, tmp_path / "out", Q4_0)
    assert not (tmp_path / "out").exists()


def test_a_context_that_fits_no_memory_is_refused_before_anything_is_made(tokenizer_path, tmp_path, monkeypatch):
    source = directory_of(tokenizer_path, tmp_path / "model")
    monkeypatch.setattr("mobillama.deploy.source.memory_bytes", lambda: 4 * 128 * (2 * 3 * 64 + 16) - 1)
    with pytest.raises(UsageError, match=r"context of 128 tokens does not fit the memory; give --context"):
        export_onnx(source, tmp_path / "out")
    assert export_onnx(source, tmp_path / "out", context=64, tokens=50)["context"] == 64


def test_generate_and_chat_take_what_was_exported(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model")
    done = run_cli("export", "onnx", source, tmp_path / "out", "--type", "q8_0", "--cache", "float32")
    assert done.returncode == 0 and "same likeliest token" in done.stderr, done.stderr
    export_gguf(source, tmp_path / "m.gguf", Q8_0)
    said = set()
    for path in (tmp_path / "out", tmp_path / "out" / "model.onnx", tmp_path / "m.gguf"):
        words = ["generate", path, "--prompt", "The ship", "--max-tokens", 5, "--temperature", 0, "--threads", 1]
        done = run_cli(*words)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1
    assert run_cli("chat", tmp_path / "out").returncode == 0
    done = run_cli("generate", tmp_path / "out", "--prompt", "The ship", "--engine", "torch")
    assert done.returncode == 2 and "was made for onnxruntime" in done.stderr
    done = run_cli("generate", tmp_path / "out", "--prompt", "word " * 200)
    assert done.returncode == 2 and "leave no room" in done.stderr
    (tmp_path / "out" / "tokenizer.json").unlink()
    done = run_cli("generate", tmp_path / "out", "--prompt", "The ship")
    assert done.returncode == 2 and "no tokenizer.json" in done.stderr
