"""Quantized files: what the method chose is what they hold, calibration pays, figures and errors are as documented."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CONTEXT, VOCAB, run_cli
from mobillama.cli import main
from mobillama.compress import quantize as journey
from mobillama.compress.quantize import calibrated, judge, quantize, rounded
from mobillama.compress.texts import find_texts
from mobillama.data.dataset import Dataset
from mobillama.data.tokenizer import load_tokenizer
from mobillama.deploy.gguf import export_gguf
from mobillama.deploy.source import Source
from mobillama.directory import save_model
from mobillama.engine.blocks import Q4_0, Q4_1, TYPES, unpack
from mobillama.engine.gguf import read_gguf
from mobillama.engine.gguf_model import read_model
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig
from mobillama.train.objective import Objective

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(data, tokenizer_path, tmp_path_factory):
    """A small model with one network for three layers, trained for seconds; then channels get unequal sizes, as they have in
    models trained for long: what a norm multiplies more, the matrices behind it multiply less, and the function is the same."""
    torch.set_num_threads(1)
    config = ModelConfig(VOCAB, 64, 96, 3, 2, max_position_embeddings=CONTEXT)
    model, dataset = MobiLlama(config), Dataset(data)
    initialise(model, config, 0)
    objective, optimizer = Objective(model), torch.optim.Adam(model.parameters(), 4e-3)
    for step in range(150):
        ids = torch.from_numpy(dataset.batch(7, step, 16).ids)
        optimizer.zero_grad()
        (objective(ids)[0] / ids.numel()).backward()
        optimizer.step()
    sizes = torch.randn(64, generator=torch.Generator().manual_seed(0)).exp()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(sizes)
        for matrix in (model.model.ffns[0].gate_proj, model.model.ffns[0].up_proj):
            matrix.weight.div_(sizes)
    directory = tmp_path_factory.mktemp("trained") / "model"
    save_model(directory, config, model.bfloat16().state_dict(), load_tokenizer(tokenizer_path))
    return directory


@pytest.mark.parametrize("kind", [Q4_0, Q4_1], ids=lambda kind: kind.name)
def test_calibration_loses_less_than_rounding(kind, trained, data):
    source = Source.open(trained)
    texts = find_texts(data, source.tokenizer, CONTEXT, 64, 0)
    ours, plain = (
        judge(source, tensors, texts, CPU) for tensors in (calibrated(source, kind, texts, CPU), rounded(source, kind))
    )
    assert ours["all"].kl_nats_per_token < 0.3 * plain["all"].kl_nats_per_token
    assert ours["all"].top1_agreement > plain["all"].top1_agreement
    costs = [its["all"].bits_per_byte_copy - its["all"].bits_per_byte_model for its in (ours, plain)]
    assert 0 < costs[0] < 0.3 * costs[1]
    assert sum(ours[name].tokens for name in texts.held_out) == ours["all"].tokens


def test_the_file_holds_the_codes_that_were_chosen_and_what_they_cost(trained, data, tmp_path, monkeypatch):
    chosen = {}

    class Watched(journey.Calibration):
        def run(self):
            chosen.update(super().run())
            return chosen

    monkeypatch.setattr(journey, "Calibration", Watched)
    facts = quantize(trained, tmp_path / "m.gguf", Q4_1, "gptq", data, sequences=32)
    stored = read_model(tmp_path / "m.gguf").tensors
    assert chosen.keys() == {name for name, tensor in stored.items() if tensor.kind is Q4_1}
    for name, blocks in chosen.items():
        found = unpack(stored[name].rows, Q4_1)
        assert np.array_equal(found.codes_rgk, blocks.codes_rgk) and np.array_equal(found.scale_rg, blocks.scale_rg)
        assert np.array_equal(found.minimum_rg, blocks.minimum_rg)
    assert stored["lm_head.weight"].kind.name == "Q8_0"
    assert "blk.1.ffn_up.weight" not in read_gguf(tmp_path / "m.gguf").tensors
    assert facts == json.loads((tmp_path / "m.gguf.json").read_text())
    assert facts["calibration"] == {"text": data.name, "sequences": 32, "tokens": 32 * CONTEXT, "seed": 0}
    whole, stated = facts["held_out"]["all"], read_gguf(tmp_path / "m.gguf").metadata
    assert stated["mobillama.quantization.method"] == "gptq"
    assert stated["mobillama.quantization.calibration"] == f"2048 tokens of {data.name}, seed 0"
    for when, key in (("before", "bits_per_byte_model"), ("after", "bits_per_byte_copy")):
        assert stated[f"mobillama.quantization.bits_per_byte_{when}"] == pytest.approx(whole[key], rel=1e-6)
    kept = export_gguf(tmp_path / "m.gguf", tmp_path / "stock.gguf", None, shared=False)
    assert kept["parity"]["max_logit_error"] == 0


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_rtn_writes_what_export_writes(name, trained, tmp_path):
    facts = quantize(trained, tmp_path / "m.gguf", TYPES[name], "rtn")
    export_gguf(trained, tmp_path / "n.gguf", TYPES[name])
    ours, theirs = (read_gguf(tmp_path / f"{letter}.gguf").tensors for letter in "mn")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key].rows, theirs[key].rows) for key in ours)
    assert facts["calibration"] is None and set(facts["held_out"]) == {"all", "the sample corpus"}


def test_text_to_judge_on_is_none_to_calibrate_on(trained, data, corpus):
    tokenizer = load_tokenizer(trained)
    for path in (None, data, corpus / "books.jsonl", corpus / "code"):
        found = find_texts(path, tokenizer, CONTEXT, 40, 0)
        assert found.calibration_nt.shape == (40, CONTEXT)
        used = {row.tobytes() for row in found.calibration_nt}
        assert len(used) == 40
        assert all(row[:-1].tobytes() not in used for rows in found.held_out.values() for row in rows)
        again, other = (find_texts(path, tokenizer, CONTEXT, 40, seed) for seed in (0, 1))
        assert np.array_equal(found.calibration_nt, again.calibration_nt)
        assert not np.array_equal(found.calibration_nt, other.calibration_nt)
    assert set(find_texts(data, tokenizer, CONTEXT, 4, 0).held_out) == {"books", "code", "encyclopedia"}


def test_wrong_use_is_one_line_and_spoils_nothing(trained, tmp_path):
    out = tmp_path / "m.gguf"

    def refused(match, model=trained, **options):
        with pytest.raises(UsageError, match=match):
            quantize(model, out, Q4_0, **options)
        assert not out.exists() and not list(tmp_path.glob("m.gguf*"))

    (tmp_path / "short.txt").write_text("The ship sank.")
    (tmp_path / "text.pdf").write_bytes(b"%PDF")
    refused(r"--calibration: .*absent.txt does not exist", calibration=tmp_path / "absent.txt")
    refused(r"short\.txt has fewer than the 130 tokens of two sequences", calibration=tmp_path / "short.txt")
    refused(r"text\.pdf is none of \.jsonl", calibration=tmp_path / "text.pdf")
    refused("64 tokens of the sample corpus are fewer than the 96 inputs .* raise --sequences", sequences=1)
    refused(r"absent: no such directory", tmp_path / "absent")
    refused("unknown device", device="tpu")
    other = tmp_path / "other"
    weights = load_file(trained / "model.safetensors")
    weights["model.ffns.0.up_proj.weight"][3, 3] = torch.nan
    other.mkdir()
    for file in trained.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file(weights, other / "model.safetensors")
    refused(r"^other: model\.ffns\.0\.up_proj\.weight holds infinite numbers or NaN", other)
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        quantize(trained, out, Q4_0)
    assert out.read_bytes() == b"precious"


def test_the_command_tells_what_it_costs(trained, data, tmp_path, capsys):
    done = run_cli("compress", "quantize", trained, tmp_path / "m.gguf", "--calibration", data, "--sequences", 16)
    assert done.returncode == 0, done.stderr
    assert "held out, all:" in done.stderr and "held out, code:" in done.stderr and "bits per weight" in done.stderr
    assert json.loads(done.stdout)["method"] == "gptq"
    for words, said in ((["--type", "f16"], "invalid choice"), (["--sequences", "0"], "is no whole number from 1 on")):
        with pytest.raises(SystemExit) as left:
            main(["compress", "quantize", str(trained), str(tmp_path / "n.gguf"), *words])
        assert left.value.code == 2 and said in capsys.readouterr().err
    assert main(["compress", "quantize", str(trained), str(tmp_path / "m.gguf")]) == 2
    assert capsys.readouterr().err.strip().endswith("choose another name or remove it")
