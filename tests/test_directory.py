"""What a model directory states is held to what it holds before a model is built."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mobillama.directory import load_model, read_weights, save_tensors
from mobillama.errors import CorruptDataError


@pytest.fixture
def copied(small_model, tmp_path):
    return shutil.copytree(small_model, tmp_path / "model")


def restate(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3000}, r"config\.json: states 3,000 layers; fewer have weights"),
        ({"num_hidden_layers": 3000, "share": "block"}, "states 3,000 layers"),
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\.input_layernorm\.weight' is missing"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.input_layernorm\.weight' has no place"),
        (
            {"vocab_size": 10**12},
            r"'model\.embed_tokens\.weight' has the shape \(512, 32\), and is to be \(10{12}, 32\)",
        ),
        ({"intermediate_size": 10**9}, r"has the shape \(48, 32\)"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is '2\.0'"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes'"),
    ],
    ids=str,
)
def test_a_config_that_lies_is_told_before_a_model_is_built(change, said, copied, monkeypatch):
    restate(copied, **change)
    monkeypatch.setattr("mobillama.directory.MobiLlama", lambda config: pytest.fail("a model was built"))
    with pytest.raises(CorruptDataError, match=said):
        load_model(copied)


def test_weights_of_another_shape_or_cut_short_are_told(copied):
    path = copied / "model.safetensors"
    weights = {name: weight.clone() for name, weight in read_weights(path).items()}  # not views of the file
    save_tensors(path, weights | {"model.norm.weight": torch.ones(31)})
    with pytest.raises(CorruptDataError, match=r"'model\.norm\.weight' has the shape \(31,\), and is to be \(32,\)"):
        load_model(copied)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptDataError, match=r"model\.safetensors: damaged or truncated"):
        load_model(copied)
    path.unlink()
    with pytest.raises(CorruptDataError, match=r"model\.safetensors: missing"):
        load_model(copied)
