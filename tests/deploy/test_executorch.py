"""Exports to ExecuTorch: rounding anywhere; parity, one network in the file and refusals where it is installed."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import conftest
from conftest import VOCAB, run_cli
from mobillama.data.tokenizer import load_tokenizer
from mobillama.deploy.executorch import export_executorch
from mobillama.deploy.executorch_program import Program, Rounded, round_activations, write_program
from mobillama.deploy.gguf import export_gguf
from mobillama.engine.blocks import Q4_0, decode, encode
from mobillama.engine.load import load_engine
from mobillama.engine.torch_gguf import load_gguf
from mobillama.engine.weights import EMBEDDING
from mobillama.errors import UsageError, VerificationError
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

TEXT = "The ship was old, and the captain slept."
installed = pytest.mark.skipif(find_spec("executorch") is None, reason="needs pip install 'mobillama[executorch]'")


directory_of = functools.partial(conftest.directory_of, num_hidden_layers=2)


def ids_of(kind, path):
    tokenizer = getattr(pytest.importorskip("pytorch_tokenizers"), kind)()
    tokenizer.load(str(path))
    return list(tokenizer.encode(TEXT, 0, 0))


def test_groups_get_positive_scales_at_little_cost():
    weight_oc = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight_oc[3, 32:64] = 0
    rows = encode(weight_oc.numpy(), Q4_0)
    taken = Rounded.of_blocks(rows)
    np.testing.assert_array_equal(taken.numbers(), decode(rows, Q4_0))
    held = taken.with_positive_scales()
    assert (held.scale_og > 0).all() and held.codes_oc.min() >= -8 and held.codes_oc.max() <= 7
    assert torch.equal(held.scale_og, held.scale_og.bfloat16().float())
    kept = (taken.scale_og >= 0)[:, :, None].expand(-1, -1, 32).flatten(1)
    assert kept.any() and torch.equal(held.codes_oc[kept], taken.codes_oc[kept])
    error, unchanged = ((its.numbers() - weight_oc).norm() / weight_oc.norm() for its in (held, taken))
    assert error < 1.1 * unchanged and error < 0.1
    assert (held.numbers()[3, 32:64] == 0).all()


def test_rows_of_eight_bits_are_within_half_a_step():
    weight_oc = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    weight_oc[2] = 0
    rounded = Rounded.by_row(weight_oc)
    assert rounded.scale_og.shape == (8, 1) and rounded.codes_oc.abs().max() == 127
    assert ((rounded.numbers() - weight_oc).abs() <= 0.501 * rounded.scale_og).all()


def test_activations_are_rounded_to_eight_bits_with_a_scale_and_a_zero_for_each_token():
    config = ModelConfig(VOCAB, 32, 32, 1, 1, max_position_embeddings=8)
    model = MobiLlama(config)
    round_activations(model)
    x_nc = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100], [1], [0]])
    x_nc[0, 0], x_nc[2] = 0, x_nc[2].abs() + 1
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(torch.eye(32))
    with torch.no_grad():
        y_nc = projection(x_nc)
    step_n1 = (x_nc.amax(1, keepdim=True).clamp(min=0) - x_nc.amin(1, keepdim=True).clamp(max=0)) / 255
    error_nc = (y_nc - x_nc).abs()
    assert (error_nc <= 1.001 * step_n1).all() and error_nc[:3].mean(1).gt(0.1 * step_n1[:3, 0]).all()
    assert y_nc[0, 0] == 0 and (y_nc[3] == 0).all()
    torch.testing.assert_close(y_nc[:3] / step_n1[:3], (y_nc[:3] / step_n1[:3]).round(), atol=1e-3, rtol=0)


@pytest.mark.skipif(find_spec("executorch") is not None, reason="is installed")
def test_without_executorch_its_extra_is_named(small_model, tmp_path):
    done = run_cli("export", "executorch", small_model, tmp_path / "m.pte")
    assert done.returncode == 2 and "pip install 'mobillama[executorch]'" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@installed
def test_an_export_is_compared_recorded_and_run(tokenizer_path, tmp_path):
    source, out = directory_of(tokenizer_path, tmp_path / "model"), tmp_path / "m.pte"
    done = run_cli("export", "executorch", source, out)
    assert done.returncode == 0 and "same likeliest token" in done.stderr, done.stderr
    facts = json.loads((tmp_path / "m.pte.json").read_text())
    assert facts["shared"] and facts["type"] == "8da4w" and facts["bytes"] == out.stat().st_size
    assert facts["parity"]["tokens"] == 1024 and facts["parity"]["kl_nats_per_token"] < 0.3
    computed, rounding = (
        facts[name]["kl_nats_per_token"] for name in ("parity_on_the_same_numbers", "rounding_of_activations_in_torch")
    )
    assert 0 < computed < 1e-3 and computed == pytest.approx(rounding, rel=0.2)
    assert (
        ids_of("CppSPTokenizer", tmp_path / "m.pte.tokenizer.model") == load_tokenizer(tokenizer_path).encode([TEXT])[0]
    )
    for taken in (out, tmp_path / "m.pte.json", tmp_path / "m.pte.tokenizer.model"):
        others = tmp_path / f"only-{taken.name}"
        others.mkdir()
        (others / taken.name).touch()
        with pytest.raises(UsageError, match="exists already"):
            export_executorch(source, others / "m.pte")


@installed
def test_float32_is_exact_with_grouped_heads_normed_queries_and_a_short_context(tokenizer_path, tmp_path):
    source = directory_of(
        tokenizer_path, tmp_path / "model", num_key_value_heads=2, qk_norm=True, intermediate_size=100
    )
    facts = export_executorch(source, tmp_path / "m.pte", "float32", context=40, tokens=100)
    assert facts["parity"]["max_logit_error"] < 1e-4 and facts["parity"]["top1_agreement"] == 1
    assert facts["context"] == 40
    program, ids = Program(tmp_path / "m.pte"), np.random.default_rng(0).integers(3, VOCAB, 40).tolist()
    expected = load_engine(source)[0].feed_each(ids)
    program.feed(ids[:30], 0)
    np.testing.assert_allclose(program.feed(ids[30:], 30), expected[-1], atol=1e-4)
    np.testing.assert_allclose(
        program.feed(ids[20:25], 20), expected[24], atol=1e-4
    )  # taken back to an earlier position


@installed
def test_codes_of_a_quantized_source_with_a_tied_head_survive(tokenizer_path, tmp_path):
    gguf = tmp_path / "m.gguf"
    export_gguf(directory_of(tokenizer_path, tmp_path / "model", tie_word_embeddings=True), gguf, Q4_0)
    facts = export_executorch(gguf, tmp_path / "m.pte", tokens=200)
    assert facts["parity"]["tokens"] == 200 and facts["parity"]["kl_nats_per_token"] < 0.02
    assert ids_of("CppHFTokenizer", tmp_path / "m.pte.tokenizer.json") == load_gguf(gguf)[1].encode([TEXT])[0]


@installed
@pytest.mark.parametrize("rounded", [True, False], ids=["8da4w", "float32"])
def test_a_shared_network_stands_once_in_the_file(rounded, tmp_path):
    sizes = {}
    for share in ("ffn", "none"):
        config = ModelConfig(64, 64, 512, 3, 2, max_position_embeddings=32, share=share)
        model = MobiLlama(config)
        initialise(model, config, 0)
        weights = dict(model.state_dict())
        for name, weight in weights.items() if rounded else ():
            if weight.dim() == 2:
                its = Rounded.of_blocks(encode(weight.numpy(), Q4_0))
                weights[name] = its if name == EMBEDDING else its.with_positive_scales()
        write_program(tmp_path / share, config, weights, {})
        sizes[share] = (tmp_path / share).stat().st_size
    network = 3 * 64 * 512 * (0.5 + 2 / 32 if rounded else 4)
    assert 1.95 * network < sizes["none"] - sizes["ffn"] < 2.2 * network


@installed
def test_what_the_type_cannot_hold_is_refused_by_name(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "odd", intermediate_size=100)
    with pytest.raises(UsageError, match=r"rows of 100 numbers.*--type float32"):
        export_executorch(source, tmp_path / "m.pte")
    for context in (1, 129):
        with pytest.raises(UsageError, match=r"not within 2…128"):
            export_executorch(source, tmp_path / "m.pte", "float32", context)
    assert not list(tmp_path.glob("*m.pte*"))


@installed
def test_a_model_that_does_not_bear_rounded_activations_is_refused(tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr("mobillama.deploy.executorch._MOST_ROUNDING_KL", 1e-9)
    with pytest.raises(UsageError, match="take --type float32"):
        export_executorch(directory_of(tokenizer_path, tmp_path / "model"), tmp_path / "m.pte")
    assert not list(tmp_path.glob("*m.pte*"))


@installed
@pytest.mark.parametrize("slight", [False, True], ids=["rotary positions", "scales 3% too large"])
def test_a_program_that_computes_something_else_is_not_kept(slight, tokenizer_path, tmp_path, monkeypatch):
    source = directory_of(tokenizer_path, tmp_path / "model")
    from mobillama.deploy import executorch_program

    rotary, weight = executorch_program.rotary_tables, Rounded.product_weight
    if slight:
        wrong = lambda its: weight(dataclasses.replace(its, scale_og=1.03 * its.scale_og))  # noqa: E731
        monkeypatch.setattr(Rounded, "product_weight", wrong)
    else:
        monkeypatch.setattr(executorch_program, "rotary_tables", lambda *inputs: rotary(*inputs)[::-1])
    with pytest.raises(VerificationError, match="nats/token"):
        export_executorch(source, tmp_path / "m.pte")
    assert not list(tmp_path.glob("*m.pte*"))
