"""Models from elsewhere: official checkpoints in exactly their layout, any Llama directory, GGUF; and all that may be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conftest import VOCAB, run_cli
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.deploy.gguf import export_gguf
from mobillama.directory import load_model, save_model
from mobillama.engine.blocks import TYPES
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError
from mobillama.hf.unshare import unshare, unshare_weights
from mobillama.importing.models import import_model
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

SHAPE = ModelConfig(VOCAB, 64, 96, 4, 4, max_position_embeddings=64, initializer_range=0.1)


def built(**changes) -> MobiLlama:
    config = ModelConfig(**{**vars(SHAPE), **changes})
    model = MobiLlama(config)
    initialise(model, config, 0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def official_config(shape: ModelConfig) -> dict:
    """config.json as MBZUAI/MobiLlama-05B has it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoConfig": "configuration.LlamaConfig", "AutoModelForCausalLM": "modelling.LlamaForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "llama",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": 2,  # which is not true
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def official_weights(model: MobiLlama) -> dict[str, torch.Tensor]:
    """The state dict as the official files hold it: a copy of the network for each layer, and the rotary buffers."""
    shape = model.model.shape
    weights = {name: tensor.clone() for name, tensor in unshare_weights(model.state_dict(), shape).items()}
    frequencies = 1.0 / 10000 ** (torch.arange(0, shape.attention_head_dim, 2).float() / shape.attention_head_dim)
    for layer in range(shape.num_hidden_layers):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
    return weights


@pytest.fixture
def official(tokenizer_path, tmp_path):
    """Return what makes an official directory of a model's weights, in one pickle or in two with an index."""

    def make(model: MobiLlama, weights=None, shards=1, legacy=False):
        path = tmp_path / "official"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(official_config(model.model.shape)))
        shutil.copyfile(tokenizer_path, path / "tokenizer.model")
        (path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "{{ messages }}"}')
        weights = weights or official_weights(model)
        if shards == 1:
            torch.save(weights, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
            return path
        names, table = list(weights), {}
        for number in range(shards):
            file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            part = {name: weights[name] for name in names[number::shards]}
            torch.save(part, path / file)
            table |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": table}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return path

    return make


@pytest.mark.parametrize("files", [{"shards": 1}, {"shards": 2}, {"legacy": True}], ids=str)
def test_an_official_checkpoint_is_stored_once_with_its_real_heads(files, official, tmp_path):
    model = built()
    source = official(model, **files)
    facts = import_model(source, tmp_path / "m")
    copy = load_model(tmp_path / "m")
    assert copy.model.shape.share == "ffn"
    assert copy.model.shape.key_value_heads == 4
    assert copy.model.shape.rms_norm_eps == 1e-6
    assert copy.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in copy.state_dict().items())
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 0.75 * sum(
        f.stat().st_size for f in source.glob("*.bin")
    )
    notes = " · ".join(facts["notes"])
    assert "states 2 key/value heads; the weights have 4" in notes and "3 copies of the feed-forward network" in notes
    assert facts == json.loads((tmp_path / "m" / "import.json").read_text())
    assert {name for name in facts["files"] if name.endswith(".bin")} == {f.name for f in source.glob("*.bin")}
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_whole_shared_block_is_found_and_groups_are(official, tmp_path):
    facts = import_model(official(built(share="block")), tmp_path / "block")
    assert facts["share"] == "block"
    assert load_model(tmp_path / "block").model.shape.share == "block"
    twin = unshare(built(ffn_groups=2).state_dict(), ModelConfig(**{**vars(SHAPE), "ffn_groups": 2}))
    twin.save_pretrained(tmp_path / "twin")
    save_tokenizer(load_tokenizer(official(built()) / "tokenizer.model"), tmp_path / "twin")
    import_model(tmp_path / "twin", tmp_path / "groups")
    assert load_model(tmp_path / "groups").model.shape.ffn_groups == 2


def test_copies_that_differ_are_refused_saying_where_and_by_how_much_and_can_be_kept(official, tmp_path):
    model = built()
    weights = official_weights(model)
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.25
    source = official(model, weights)
    done = run_cli("import", source, tmp_path / "m")
    assert done.returncode == 4
    said = done.stderr.strip().splitlines()[-1]
    for part in ("layer 2's mlp.down_proj differs from layer 0's by up to 0.25", "--unshared"):
        assert part in said
    assert not (tmp_path / "m").exists()
    done = run_cli("import", source, tmp_path / "m", "--unshared")
    assert done.returncode == 0, done.stderr
    copy = load_model(tmp_path / "m")
    assert copy.model.shape.share == "none"
    assert torch.equal(copy.model.ffns[2].down_proj.weight, weights["model.layers.2.mlp.down_proj.weight"])


LLAMAS = [
    {},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"head_dim": 24, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"num_hidden_layers": 1},
    {"qwen3": True, "num_key_value_heads": 2},
]


@pytest.mark.parametrize("changes", LLAMAS, ids=str)
@torch.no_grad()
def test_any_llama_directory_computes_what_transformers_computes(changes, tokenizer_path, tmp_path):
    settings = dict(changes)
    kind, model_class = (Qwen3Config, Qwen3ForCausalLM) if settings.pop("qwen3", 0) else (LlamaConfig, LlamaForCausalLM)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    settings = {**sizes, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 128, **settings}
    torch.manual_seed(0)
    theirs = model_class(kind(**settings, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    save_tokenizer(load_tokenizer(tokenizer_path), tmp_path / "theirs")
    facts = import_model(tmp_path / "theirs", tmp_path / "ours")
    ours, ids = load_model(tmp_path / "ours"), torch.randint(0, VOCAB, (2, 60))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert ours.model.shape.share == "none"
    assert facts["stored_parameters"] == sum(p.numel() for p in theirs.parameters())
    outer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(outer(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"share": "none", "num_key_value_heads": 2}, {"tie_word_embeddings": True}], ids=str
)
def test_a_gguf_file_comes_back_bit_for_bit(changes, tokenizer_path, tmp_path):
    model = built(**changes).bfloat16()
    save_model(tmp_path / "m", model.model.shape, model.state_dict(), load_tokenizer(tokenizer_path))
    for name, shared in (("shared", True), ("unshared", False)):
        export_gguf(tmp_path / "m", tmp_path / f"{name}.gguf", TYPES["bf16"], shared)
        facts = import_model(tmp_path / f"{name}.gguf", tmp_path / name)
        assert facts["dtype"] == "bfloat16"
        copy = load_model(tmp_path / name)
        assert copy.model.shape.layer_weights == model.model.shape.layer_weights
        assert copy.model.shape.key_value_heads == model.model.shape.key_value_heads
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in copy.state_dict().items())
    export_gguf(tmp_path / "m", tmp_path / "q.gguf", TYPES["q8_0"])
    assert import_model(tmp_path / "q.gguf", tmp_path / "q")["dtype"] == "float32"
    assert import_model(tmp_path / "q.gguf", tmp_path / "q16", torch.bfloat16)["dtype"] == "bfloat16"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_numbers_that_a_type_does_not_reach_are_not_made_infinite(official, tokenizer_path, tmp_path):
    model = built()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 70000
    save_model(tmp_path / "m", model.model.shape, model.state_dict(), load_tokenizer(tokenizer_path))
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", TYPES["f32"])
    for source in (official(model), tmp_path / "m.gguf"):
        with pytest.raises(UsageError, match=r"'lm_head\.weight' holds numbers up to 7e\+04.*take --dtype bfloat16"):
            import_model(source, tmp_path / "out", torch.float16)
        assert not (tmp_path / "out").exists()
        import_model(source, tmp_path / f"{source.name}-bf16", torch.bfloat16)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(legacy, official, tmp_path):
    model = built()
    source = official(model)
    evil = official_weights(model) | {"model.norm.bias": Evil(tmp_path / "ran")}
    torch.save(evil, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CorruptDataError, match=r"pytorch_model\.bin: wants to run \w+\.mkdir.*nothing of it was run"):
        import_model(source, tmp_path / "m")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CorruptDataError, match=r"pytorch_model\.bin: "):
        import_model(source, tmp_path / "m")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "m").exists()


def test_truncated_and_incomplete_files_are_named(official, tmp_path):
    model = built()
    source = official(model)
    whole = (source / "pytorch_model.bin").read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 20):
        (source / "pytorch_model.bin").write_bytes(whole[:size])
        with pytest.raises(CorruptDataError, match=r"pytorch_model\.bin: damaged"):
            import_model(source, tmp_path / "m")
    source = official(model, shards=2)
    next(source.glob("*00002.bin")).unlink()
    with pytest.raises(CorruptDataError, match=r"00002\.bin: missing"):
        import_model(source, tmp_path / "m")
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(CorruptDataError, match="names no files of this directory"):
        import_model(source, tmp_path / "m")
    for change, message in [
        (
            lambda w: w.pop("model.layers.3.self_attn.v_proj.weight"),
            r"layers\.3\.self_attn\.v_proj\.weight' is missing",
        ),
        (lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(95, 64)}), r"has the shape \(95, 64\)"),
        (lambda w: w.pop("lm_head.weight"), r"'lm_head\.weight' is missing"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), r"q_proj\.bias' has no place"),
        (lambda w: w["model.layers.1.self_attn.rotary_emb.inv_freq"].mul_(2), "not the frequencies of rope_theta"),
        (lambda w: w.pop("model.embed_tokens.weight"), "holds no matrix 'model.embed_tokens.weight'"),
    ]:
        weights = official_weights(model)
        change(weights)
        with pytest.raises(MobiLlamaError, match=message):
            import_model(official(model, weights), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3"}, "model_type is 'phi3'"),
        ({"model_type": "mobillama"}, "already"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 5}, "5 heads of"),
        ({"num_attention_heads": "4"}, "not a positive number"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"num_hidden_layers": 3}, "has no place"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_of_other_models_are_refused(change, message, official, tmp_path):
    source = official(built())
    (source / "config.json").write_text(json.dumps(official_config(SHAPE) | change))
    with pytest.raises(MobiLlamaError, match=message) as caught:
        import_model(source, tmp_path / "m")
    assert "official" in str(caught.value)


def test_safetensors_that_lie_are_refused(official, tmp_path):
    source = official(built())
    (source / "pytorch_model.bin").unlink()
    save_file(official_weights(built()), source / "model.safetensors")
    whole = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = "model.norm.weight"
    lies = [
        whole[:-8],
        whole[:5],
        (1 << 60).to_bytes(8, "little") + whole[8:],
        _with_header(whole, {**header, name: {**header[name], "data_offsets": [0, 1 << 60]}}),
        _with_header(whole, {**header, name: {**header[name], "shape": [1 << 40]}}),
        _with_header(whole, {**header, name: {**header[name], "shape": [-1]}}),
    ]
    for lie in lies:
        (source / "model.safetensors").write_bytes(lie)
        with pytest.raises(CorruptDataError, match=r"model\.safetensors: damaged"):
            import_model(source, tmp_path / "m")
    (source / "model.safetensors").write_bytes(whole)
    import_model(source, tmp_path / "m")


def _with_header(whole: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + int.from_bytes(whole[:8], "little") :]


def test_a_wrong_tokenizer_is_refused_and_padding_rows_are_left_out(official, tokenizer_path, tmp_path):
    with pytest.raises(UsageError, match=rf"has {VOCAB} ids, the model {VOCAB - 8}"):
        import_model(official(built(vocab_size=VOCAB - 8)), tmp_path / "m")
    model = built(vocab_size=VOCAB + 8)
    facts = import_model(official(model), tmp_path / "m")
    assert "8 rows of the vocabulary" in " ".join(facts["notes"])
    copy, ids = load_model(tmp_path / "m"), torch.randint(0, VOCAB, (1, 20))
    assert copy.model.shape.vocab_size == VOCAB
    assert torch.equal(copy.lm_head.weight, model.lm_head.weight[:VOCAB])
    assert copy(ids).shape == (1, 20, VOCAB)
    source = official(built())
    (source / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match=r"holds neither tokenizer\.model"):
        import_model(source, tmp_path / "n")


def test_wrong_paths_are_one_line(official, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        import_model(tmp_path, tmp_path / "m")
    with pytest.raises(UsageError, match="no such file"):
        import_model(tmp_path / "absent", tmp_path / "m")
    source = official(built())
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        import_model(source, tmp_path / "m")
    with pytest.raises(UsageError, match="exists already"):
        import_model(source, source)
