"""Exports to GGUF compute what the model computes, hold the network once, and keep a quantized source's codes."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
from conftest import run_cli
from mobillama.data.tokenizer import load_tokenizer
from mobillama.deploy import gguf as deploy
from mobillama.deploy.gguf import export_gguf
from mobillama.directory import load_model
from mobillama.engine.blocks import TYPES
from mobillama.engine.gguf import read_gguf
from mobillama.engine.gguf_model import read_model
from mobillama.engine.torch_gguf import load_gguf
from mobillama.errors import UsageError, VerificationError
from mobillama.model.cost import model_cost
from mobillama.recipe import PRESETS

directory_of = functools.partial(conftest.directory_of, num_hidden_layers=4, max_position_embeddings=64)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("kind", TYPES)
def test_an_export_computes_the_same_within_its_types_rounding(kind, shared, tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model", num_key_value_heads=2)
    facts = export_gguf(source, tmp_path / "m.gguf", TYPES[kind], shared)
    assert facts == json.loads((tmp_path / "m.gguf.json").read_text())
    assert facts["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert facts["head"] == ("Q8_0" if kind.startswith("q4") else kind.upper())
    most = {"f32": 1e-9, "f16": 1e-6, "bf16": 1e-4, "q8_0": 1e-3, "q4_0": 0.1, "q4_1": 0.1}[kind]
    assert facts["parity"]["kl_nats_per_token"] < most
    (copy, tokenizer), original = load_gguf(tmp_path / "m.gguf", torch.float32), load_model(source)
    largest = max(weight.abs().max() for name, weight in original.state_dict().items() if "norm" not in name)
    step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}.get(kind, 1 / 7) * largest
    for name, weight in copy.state_dict().items():
        assert (weight - original.state_dict()[name]).abs().max() <= step, name
    assert tokenizer.encode(["The ship"]) == load_tokenizer(source).encode(["The ship"])


@pytest.mark.parametrize(
    "changes",
    [{"share": "block"}, {"tie_word_embeddings": True}, {"qk_norm": True}, {"head_dim": 24}, {"ffn_groups": 2}],
    ids=str,
)
def test_every_shape_survives_exactly_in_its_own_type(changes, tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model", torch.bfloat16, **changes)
    for shared in (True, False):
        out = tmp_path / f"{shared}.gguf"
        export_gguf(source, out, TYPES["bf16"], shared)
        weights, (copy, _) = load_model(source).state_dict(), load_gguf(out)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in copy.state_dict().items())
        assert copy.lm_head.weight.dtype == torch.bfloat16


def test_codes_of_a_quantized_source_are_kept_and_only_other_types_encoded_anew(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model")
    export_gguf(source, tmp_path / "a.gguf", TYPES["q4_1"])
    rows = read_gguf(tmp_path / "a.gguf").tensors["blk.0.ffn_up.weight"].rows.copy()
    rows[:, 4] ^= 1  # as a calibrated quantizer would choose other codes than rounding does
    model = read_model(tmp_path / "a.gguf")
    name = "model.ffns.0.up_proj.weight"
    changed = model.tensors | {name: dataclasses.replace(model.tensors[name], data=rows)}
    deploy.write_model(tmp_path / "b.gguf", model.shape, changed, model.tokenizer, True)
    facts = export_gguf(tmp_path / "b.gguf", tmp_path / "c.gguf", None, False)
    assert facts["parity"]["max_logit_error"] == 0
    export_gguf(tmp_path / "b.gguf", tmp_path / "d.gguf", TYPES["q4_1"], False)
    export_gguf(tmp_path / "b.gguf", tmp_path / "e.gguf", TYPES["q4_0"])
    for out in ("c", "d"):
        stored = read_gguf(tmp_path / f"{out}.gguf").tensors
        assert all(np.array_equal(stored[f"blk.{i}.ffn_up.weight"].rows, rows) for i in range(4))
    stored = read_gguf(tmp_path / "e.gguf").tensors
    assert stored["blk.0.ffn_up.weight"].kind.name == "Q4_0" and "blk.1.ffn_up.weight" not in stored
    assert np.array_equal(stored["output.weight"].rows, read_gguf(tmp_path / "a.gguf").tensors["output.weight"].rows)


def test_rows_that_are_no_whole_blocks_become_f16(tokenizer_path, tmp_path):
    directory_of(tokenizer_path, tmp_path / "m", hidden_size=48, num_attention_heads=2)
    facts = export_gguf(tmp_path / "m", tmp_path / "m.gguf", TYPES["q4_0"])
    assert facts["types"] == ["F16", "Q4_0"]
    assert read_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"].kind.name == "Q4_0"


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_1"])
def test_nothing_is_kept_of_codes_that_are_not_the_weights(kind, tokenizer_path, tmp_path, monkeypatch):
    source, encode = directory_of(tokenizer_path, tmp_path / "model"), deploy.encode_weights

    def encode_wrong(weights, *kinds):
        return encode({name: -w if "up_proj" in name else w for name, w in weights.items()}, *kinds)

    monkeypatch.setattr(deploy, "encode_weights", encode_wrong)
    with pytest.raises(VerificationError, match=r"m\.gguf: 'model\.ffns\.0\.up_proj\.weight' in .* from the model's"):
        export_gguf(source, tmp_path / "m.gguf", TYPES[kind])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_is_kept_of_a_file_that_reads_otherwise_than_it_was_written(tokenizer_path, tmp_path, monkeypatch):
    source = directory_of(tokenizer_path, tmp_path / "model")
    monkeypatch.setattr("mobillama.engine.gguf_model._side_by_side", lambda rows, head_dim: rows)
    with pytest.raises(VerificationError, match=r"m\.gguf: '.*q_proj\.weight' reads otherwise"):
        export_gguf(source, tmp_path / "m.gguf", TYPES["q4_0"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_use_is_one_line_and_spoils_nothing(tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model")
    (tmp_path / "m.gguf").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"m\.gguf: exists already"):
        export_gguf(source, tmp_path / "m.gguf", None)
    assert (tmp_path / "m.gguf").read_bytes() == b"precious"
    (tmp_path / "n.gguf.json").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"n\.gguf\.json: exists already"):
        export_gguf(source, tmp_path / "n.gguf", None)
    assert (tmp_path / "n.gguf.json").read_bytes() == b"precious" and not (tmp_path / "n.gguf").exists()
    with pytest.raises(UsageError, match="not a GGUF file"):
        export_gguf(tmp_path / "m.gguf", tmp_path / "o.gguf", None)
    with pytest.raises(UsageError, match=r"absent: no such directory"):
        export_gguf(tmp_path / "absent", tmp_path / "o.gguf", None)
    done = run_cli("export", "gguf", source, tmp_path / "o.gguf", "--shared", "--unshared")
    assert done.returncode == 2 and "not allowed with" in done.stderr


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_without_numbers_is_not_exported(kind, tokenizer_path, tmp_path):
    source = directory_of(tokenizer_path, tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    next(weight for name, weight in weights.items() if "up_proj" in name)[3, 5] = torch.nan
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj\.weight: holds infinite numbers or NaN; take an earlier checkpoint"):
        export_gguf(source, tmp_path / "m.gguf", TYPES[kind])
    assert not list(tmp_path.glob("m.gguf*"))


def test_the_paper_sized_file_stays_below_its_limit():
    """The shared 4-bit file of the 0.5B: 18 bytes for 32 numbers, 34 in the head, float32 norms, and its vocabulary."""
    shape = PRESETS["mobillama-0.5b"][0]
    head, norms = 32000 * 2048, (2 * 22 + 1) * 2048
    rest = model_cost(shape).stored_parameters - head - norms
    assert rest * 18 // 32 + head * 34 // 32 + norms * 4 == 333_946_880
