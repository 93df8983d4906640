"""A model as a GGUF file: stored once or per layer, names and row order of llama.cpp, tokenizer and all, without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from conftest import VOCAB, shared_data
from mobillama.data.tokenizer import load_tokenizer, save_tokenizer
from mobillama.engine.blocks import TYPES, decode, encode
from mobillama.engine.gguf import Tensor, read_gguf, write_gguf
from mobillama.engine.gguf_model import read_model, stored_names, write_model
from mobillama.engine.weights import weight_shape
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import ModelConfig

SHAPES = [
    {"share": "none"},
    {"share": "ffn"},
    {"share": "block"},
    {"share": "ffn", "ffn_groups": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"share": "ffn", "head_dim": 24, "rms_norm_eps": 1e-6, "rope_theta": 5e5},
    {"share": "none", "qk_norm": True},
]


def shape_of(**changes) -> ModelConfig:
    return ModelConfig(VOCAB, 64, 96, 5, 4, max_position_embeddings=128, **changes)


def weights_of(shape: ModelConfig, kind="q4_0") -> dict[str, Tensor]:
    rng, made = np.random.default_rng(0), {}
    for name in stored_names(shape).values():
        size = weight_shape(name, shape)
        its = TYPES[kind if len(size) == 2 else "f32"]
        made[name] = Tensor(name, size, its, encode(rng.normal(size=size).reshape(-1, size[-1]), its))
    return made


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_what_is_written_is_read_back_byte_for_byte_and_stored_once(changes, shared, tokenizer_path, tmp_path):
    shape = shape_of(**changes)
    weights, tokenizer = weights_of(shape), load_tokenizer(tokenizer_path)
    write_model(tmp_path / "m.gguf", shape, weights, tokenizer, shared)
    model = read_model(tmp_path / "m.gguf")
    assert model.shape == dataclasses.replace(shape, num_key_value_heads=shape.key_value_heads)
    assert model.tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert model.tensors[name].kind == tensor.kind
        assert np.array_equal(model.tensors[name].rows, tensor.rows), name
    kept = {name for name in read_gguf(tmp_path / "m.gguf").tensors if "ffn_up" in name}
    assert len(kept) == (5 if not shared else {"none": 5, "block": 1}.get(shape.share, shape.ffn_groups))


def test_rows_of_queries_and_keys_are_in_llama_cpps_order_and_no_others(tokenizer_path, tmp_path):
    shape = shape_of(share="none", num_key_value_heads=2)
    weights = weights_of(shape, "f32")
    write_model(tmp_path / "m.gguf", shape, weights, load_tokenizer(tokenizer_path), False)
    stored = read_gguf(tmp_path / "m.gguf").tensors
    for theirs, heads in (("attn_q", 4), ("attn_k", 2)):
        ours = weights[f"model.layers.1.self_attn.{theirs[-1]}_proj.weight"].rows.view(np.float32)
        # A head's rows 0, 8, 1, 9, … of 16: partners of the rotation side by side.
        order = [head * 16 + half * 8 + i for head in range(heads) for i in range(8) for half in range(2)]
        assert np.array_equal(stored[f"blk.1.{theirs}.weight"].rows.view(np.float32), ours[order])
    assert np.array_equal(stored["blk.1.attn_v.weight"].rows, weights["model.layers.1.self_attn.v_proj.weight"].rows)


def test_copies_that_differ_are_refused_and_can_be_kept(tokenizer_path, tmp_path):
    shape = shape_of(share="ffn")
    write_model(tmp_path / "m.gguf", shape, weights_of(shape), load_tokenizer(tokenizer_path), False)
    file = read_gguf(tmp_path / "m.gguf")
    changed = dict(file.tensors)
    rows = changed["blk.3.ffn_up.weight"].rows.copy()
    rows[5, 7] ^= 1
    changed["blk.3.ffn_up.weight"] = dataclasses.replace(changed["blk.3.ffn_up.weight"], data=rows)
    write_gguf(tmp_path / "d.gguf", file.metadata, list(changed.values()))
    with pytest.raises(
        CorruptDataError, match=r"'blk\.3\.ffn_up\.weight' is to be the same as 'blk\.0\.ffn_up.*--unshared"
    ):
        read_model(tmp_path / "d.gguf")
    kept = read_model(tmp_path / "d.gguf", keep_copies=True)
    assert kept.shape.share == "none"
    assert np.array_equal(kept.tensors["model.ffns.3.up_proj.weight"].rows, rows)


def test_equal_copies_are_found_in_a_file_that_does_not_say(tokenizer_path, tmp_path):
    for share in ("ffn", "block", "none"):
        shape = shape_of(share=share)
        write_model(tmp_path / "m.gguf", shape, weights_of(shape), load_tokenizer(tokenizer_path), False)
        file = read_gguf(tmp_path / "m.gguf")
        silent = {key: value for key, value in file.metadata.items() if not key.startswith("mobillama")}
        write_gguf(tmp_path / "s.gguf", silent, list(file.tensors.values()))
        assert read_model(tmp_path / "s.gguf").shape.share == share
        assert read_model(tmp_path / "s.gguf", keep_copies=True).shape.share == "none"
    shape = shape_of(share="ffn")
    write_model(tmp_path / "m.gguf", shape, weights_of(shape), load_tokenizer(tokenizer_path), True)
    with pytest.raises(UsageError, match="no copies to keep"):
        read_model(tmp_path / "m.gguf", keep_copies=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "phi3"}, "architecture 'phi3'; Llama models"),
        ({"llama.block_count": 1 << 31}, "2,147,483,648 layers"),
        ({"llama.block_count": 6}, r"no tensor 'blk\.5"),
        ({"mobillama.share": "everything"}, "share 'everything'"),
        ({"mobillama.share": np.zeros(2, np.int32)}, "'mobillama.share' is a list"),
        ({"general.architecture": ["llama", "llama"]}, "'general.architecture' is a list"),
        ({"tokenizer.ggml.model": np.zeros(2, np.int32)}, "has a tokenizer of type"),
        ({"tokenizer.ggml.tokens": np.arange(VOCAB, dtype=np.int32)}, "contradicts itself"),
        ({"tokenizer.ggml.bos_token_id": ["1", "2"]}, "tokenizer is incomplete"),
        ({"llama.attention.head_count": "4"}, "not a number"),
        ({"llama.attention.head_count": 3}, "possible model"),
        ({"llama.feed_forward_length": 128}, r"has the shape \(96, 64\), and is to be \(128, 64\)"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'; such models"),
        ({"llama.rope.dimension_count": 8}, "only a part of each head"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of type 'bert'"),
        ({"tokenizer.ggml.eos_token_id": 512}, "eos_id is 512"),
        ({"tokenizer.ggml.scores": np.zeros(3, np.float32)}, "tokenizer is incomplete"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_that_contradict_the_tensors_are_named(change, message, tokenizer_path, tmp_path):
    shape = shape_of(share="none")
    write_model(tmp_path / "m.gguf", shape, weights_of(shape), load_tokenizer(tokenizer_path), False)
    file = read_gguf(tmp_path / "m.gguf")
    write_gguf(tmp_path / "d.gguf", file.metadata | change, list(file.tensors.values()))
    with pytest.raises((CorruptDataError, UsageError), match=message) as caught:
        _ = read_model(tmp_path / "d.gguf").tokenizer
    assert "d.gguf" in str(caught.value)


def test_a_tensor_that_no_llama_has_is_refused(tokenizer_path, tmp_path):
    shape = shape_of(share="none")
    write_model(tmp_path / "m.gguf", shape, weights_of(shape), load_tokenizer(tokenizer_path), False)
    file = read_gguf(tmp_path / "m.gguf")
    bias = Tensor("blk.0.attn_q.bias", (64,), TYPES["f32"], encode(np.zeros((1, 64)), TYPES["f32"]))
    write_gguf(tmp_path / "d.gguf", file.metadata, [*file.tensors.values(), bias])
    with pytest.raises(UsageError, match=r"attn_q\.bias' has no place"):
        read_model(tmp_path / "d.gguf")


def test_a_tokenizer_larger_than_the_model_is_refused_and_a_smaller_one_padded(tokenizer_path, tmp_path):
    tokenizer = load_tokenizer(tokenizer_path)
    small = dataclasses.replace(shape_of(share="none"), vocab_size=VOCAB - 1)
    with pytest.raises(UsageError, match=f"has {VOCAB} ids, the model {VOCAB - 1}"):
        write_model(tmp_path / "m.gguf", small, weights_of(small), tokenizer, False)
    assert list(tmp_path.iterdir()) == []
    large = dataclasses.replace(small, vocab_size=VOCAB + 2)
    write_model(tmp_path / "m.gguf", large, weights_of(large), tokenizer, False)
    assert read_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB + 1}]"


TEXTS = [
    "Call me Ishmael.  Some years\nago — never mind 1234 how long,\t\tprecisely.",
    "def f(x):\n    return {'a': [1, 2, x**2]}\n\n",
    " naïve 漢字 🦙 they're I'LL <s> </s> <|im_start|>user ▁ \u200b x²½",
    "",
]


@pytest.mark.parametrize("file", ["small", "llama.model", "mistral-v1.model"])
def test_a_sentencepiece_tokenizer_survives_and_gives_sentencepieces_ids(file, tokenizer_path, tmp_path):
    path = tokenizer_path if file == "small" else shared_data() / "tokenizers" / file
    tokenizer = load_tokenizer(path)
    shape = dataclasses.replace(shape_of(), vocab_size=tokenizer.vocab_size)
    write_model(tmp_path / "m.gguf", shape, weights_of(shape), tokenizer, True)
    read = read_model(tmp_path / "m.gguf").tokenizer
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert read.encode(TEXTS) == [oracle.encode(text) for text in TEXTS]
    assert (read.bos_id, read.eos_id, read.vocab_size) == (1, 2, tokenizer.vocab_size)
    assert read.token_bytes == tokenizer.token_bytes
    save_tokenizer(read, tmp_path)
    from_json = load_tokenizer(tmp_path / "tokenizer.json")  # scores are then ranks of merges
    write_model(tmp_path / "n.gguf", shape, weights_of(shape), from_json, True)
    assert read_model(tmp_path / "n.gguf").tokenizer.encode(TEXTS) == read.encode(TEXTS)


@pytest.mark.parametrize("words", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_survives_with_its_template(words, tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from mobillama.data.vocabulary import WORD_PATTERNS

    hub = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }  # as models of these names have them on the hub
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = hub.get(words) or pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERNS[words][0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}')
    tokenizer = load_tokenizer(tmp_path)
    shape = dataclasses.replace(shape_of(), vocab_size=tokenizer.vocab_size)
    write_model(tmp_path / "m.gguf", shape, weights_of(shape), tokenizer, True)
    model = read_model(tmp_path / "m.gguf")
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == words
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert model.tokenizer.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert model.tokenizer.token_bytes == tokenizer.token_bytes
    save_tokenizer(model.tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").vocabulary == model.tokenizer.vocabulary


def test_reading_a_model_loads_neither_torch_nor_transformers():
    code = "import mobillama.engine.gguf_model, sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"}.isdisjoint(done.stdout.split())


def test_a_number_is_the_same_for_the_gguf_package(tokenizer_path, tmp_path):
    from gguf import GGUFReader, dequantize

    shape = shape_of(share="ffn")
    weights = weights_of(shape, "q4_1")
    write_model(tmp_path / "m.gguf", shape, weights, load_tokenizer(tokenizer_path), True)
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    tensor = theirs["blk.0.ffn_down.weight"]
    down = weights["model.ffns.0.down_proj.weight"]
    assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), decode(down.rows, down.kind))
