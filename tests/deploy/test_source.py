"""What all exports open, and refuse alike."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mobillama.compress.quantize import quantize
from mobillama.data.tokenizer import load_tokenizer
from mobillama.deploy.gguf import export_gguf
from mobillama.deploy.hf import export_hf
from mobillama.deploy.onnx import export_onnx
from mobillama.deploy.source import Source
from mobillama.directory import load_model, save_model
from mobillama.engine.blocks import Q4_0, Q8_0
from mobillama.engine.load import load_engine
from mobillama.errors import UsageError
from mobillama.importing.models import import_model
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig


def test_a_tokenizer_of_more_ids_than_the_model_is_told_by_every_export(tokenizer_path, tmp_path):
    config = ModelConfig(500, 64, 96, 2, 4, max_position_embeddings=64)  # the tokenizer has 512
    model = MobiLlama(config)
    initialise(model, config, 0)
    save_model(tmp_path / "m", config, model.state_dict(), load_tokenizer(tokenizer_path))
    exports = [
        lambda out: export_hf(tmp_path / "m", out, unshared=False),
        lambda out: export_hf(tmp_path / "m", out, unshared=True),
        lambda out: export_gguf(tmp_path / "m", out, None),
        lambda out: export_onnx(tmp_path / "m", out),
        lambda out: quantize(tmp_path / "m", out, Q4_0),
        lambda out: load_engine(tmp_path / "m"),
    ]
    for export in exports:
        with pytest.raises(
            UsageError, match=r"tokenizer has 512 ids, the model 500; put the model's own tokenizer there"
        ):
            export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("unshared", [True, False], ids=["unshared", "shared"])
def test_a_gguf_file_becomes_a_hugging_face_directory(unshared, small_model, tmp_path):
    export_gguf(small_model, tmp_path / "m.gguf", Q8_0)
    facts = export_hf(tmp_path / "m.gguf", tmp_path / "hf", unshared)
    assert facts["parity"]["kl_nats_per_token"] < 1e-9
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "hf").iterdir())
    if not unshared:
        decoded = Source.open(tmp_path / "m.gguf").weights
        assert all(torch.equal(its, decoded[name]) for name, its in load_model(tmp_path / "hf").state_dict().items())
        return
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert stated["architectures"] == ["LlamaForCausalLM"] and stated["eos_token_id"] == 2
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 2
    with pytest.raises(UsageError, match=r"model_type is 'llama'.*'mobillama import .*hf OUT'"):
        load_engine(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    assert load_engine(tmp_path / "again")[0].context_length == 128


def test_a_file_where_a_directory_is_wanted_names_import(small_model, tmp_path):
    shutil.copy(small_model / "model.safetensors", tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=r"mobillama import .*m\.safetensors OUT"):
        load_model(tmp_path / "m.safetensors")
