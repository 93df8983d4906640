"""The native engine against the torch model that holds the same decoded weights."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mobillama.data.tokenizer import load_tokenizer
from mobillama.engine import NATIVE, TORCH
from mobillama.engine.blocks import TYPES, encode
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import GGUFModel, read_model, stored_names, write_model
from mobillama.engine.load import load_batch_engine, load_engine
from mobillama.engine.torch_gguf import decode_weights
from mobillama.engine.weights import EMBEDDING, weight_shape
from mobillama.errors import CorruptDataError, UsageError
from mobillama.model.transformer import MobiLlama
from mobillama.native.build import CannotBuild, library_name
from mobillama.native.library import _remove_unused, kernels, library
from mobillama.recipe import ModelConfig

try:
    library()
except CannotBuild as error:
    pytest.skip(str(error), allow_module_level=True)

from mobillama.engine.native_engine import NativeBatchEngine, NativeEngine

SHAPES = {
    "unshared": {"share": "none"},
    "shared": {"share": "ffn"},
    "block": {"share": "block"},
    "groups, grouped heads, tied": {
        "share": "ffn", "ffn_groups": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "own head width, one key head, QK-norm": {"share": "none", "head_dim": 24, "num_key_value_heads": 1, "qk_norm": True},
    "heads of 32, grouped": {"share": "ffn", "head_dim": 32, "num_key_value_heads": 2},
    "odd sizes": {"hidden_size": 72, "head_dim": 18, "intermediate_size": 100},
}  # fmt: skip
BASE = {
    "vocab_size": 333,
    "hidden_size": 160,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
}
IDS = np.random.default_rng(1).integers(0, 333, 150).tolist()


def model_of(kind: str, seed: int = 0, **changes) -> GGUFModel:
    shape = ModelConfig(**BASE | changes)
    random, tensors = np.random.default_rng(seed), {}
    for name in stored_names(shape).values():
        size = weight_shape(name, shape)
        its = TYPES["f32" if len(size) == 1 else kind if size[-1] % TYPES[kind].values == 0 else "f16"]
        values = random.normal(1, 0.2, size) if len(size) == 1 else random.normal(0, 0.04, size)
        tensors[name] = Tensor(name, size, its, encode(values.reshape(-1, size[-1]), its))
    return GGUFModel(shape, tensors)


def torch_logits(model: GGUFModel, ids=IDS) -> np.ndarray:
    with torch.device("meta"):
        reference = MobiLlama(model.shape)
    reference.load_state_dict(decode_weights(model, torch.float32), assign=True)
    with torch.no_grad():
        return reference.eval()(torch.tensor([ids]))[0].numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The relative error of all logits."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "f16", "bf16", "f32"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_torchs(changes, kind):
    model = model_of(kind, **changes)
    expected = torch_logits(model)
    # With QK-norm even random queries and keys look at few positions, which what 8 bits round moves more.
    rounding = (2.5e-2 if model.shape.qk_norm else 2e-2) if TYPES[kind].is_quantized else 1e-3
    for name in kernels():
        assert distance(NativeEngine(model, 1, name, exact=True).feed_each(IDS), expected) < 1e-3
        assert distance(NativeEngine(model, 1, name).feed_each(IDS), expected) < rounding


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_blocks_that_an_outlier_stands_in_are_rounded_twice(kind):
    # One channel of each norm far above the others coarsens the steps of 31 neighbours: rounded once, the error is 2.8e-2.
    model = model_of(kind, head_dim=32)
    for name, tensor in model.tensors.items():
        if name.endswith("norm.weight"):
            tensor.rows.view(np.float32)[0, 17] = 60
    expected = torch_logits(model)
    engines = [NativeEngine(model, 2, name, cache="f16") for name in kernels()]
    found = [engine.feed_each(IDS) for engine in engines]
    assert all(distance(logits, expected) < 1.4e-2 for logits in found)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "f16"])
@pytest.mark.parametrize("head", [32, 40])
def test_token_by_token_in_chunks_or_after_truncation_the_logits_are_the_same_bits(kind, head):
    model = model_of(kind, num_key_value_heads=2, head_dim=head)
    for name in kernels():
        engine = NativeEngine(model, 2, name)
        each = engine.feed_each(IDS)
        assert engine.length == 150
        for step in (1, 7):
            engine.truncate(0)
            pieces = [engine.feed_each(IDS[start : start + step]) for start in range(0, len(IDS), step)]
            assert np.array_equal(np.concatenate(pieces), each)
        engine.truncate(13)
        assert engine.length == 13
        assert np.array_equal(engine.feed(IDS[13:140]), each[139])
        assert np.array_equal(engine.feed_each(IDS[140:]), each[140:])


@pytest.mark.parametrize(("kind", "head"), [("q4_0", 32), ("q4_0", 40), ("f16", 32)])
def test_each_slot_has_the_bits_that_its_sequence_has_alone(kind, head):
    model = model_of(kind, num_key_value_heads=2, head_dim=head)
    draw = np.random.default_rng(3)
    rows = [draw.integers(0, 333, 60 + 17 * slot).tolist() for slot in range(5)]
    for name in kernels():
        engine = NativeBatchEngine(model, 5, 2, name)
        alone = [NativeEngine(model, 1, name).feed_each(ids) for ids in rows]
        while any(engine.length(slot) < len(ids) for slot, ids in enumerate(rows)):
            # Slots join at other times with prompts of other lengths, some longer than a pass; others decode meanwhile.
            open_slots = [slot for slot, ids in enumerate(rows) if engine.length(slot) < len(ids)]
            chosen = draw.permutation([slot for slot in open_slots if draw.random() < 0.7] or open_slots).tolist()
            work = []
            for slot in chosen:
                start = engine.length(slot)
                work.append((slot, rows[slot][start : start + (int(draw.integers(1, 90)) if start == 0 else 1)]))
            logits = engine.feed(work)
            assert logits.shape == (len(work), 333)
            for row, slot in enumerate(chosen):
                assert np.array_equal(logits[row], alone[slot][engine.length(slot) - 1]), (name, slot)


def test_a_slot_is_used_again_after_truncation_and_its_neighbours_do_not_notice():
    model = model_of("q4_1", head_dim=32)
    engine = NativeBatchEngine(model, 2, 2)
    engine.feed([(0, IDS[:50]), (1, IDS[50:90])])
    engine.truncate(0, 0)
    engine.truncate(1, 30)
    assert (engine.length(0), engine.length(1)) == (0, 30)
    found = engine.feed_each([(1, IDS[80:90]), (0, IDS[100:140])])
    assert np.array_equal(found[:10], NativeEngine(model, 1).feed_each(IDS[50:90])[30:])
    assert np.array_equal(found[10:], NativeEngine(model, 1).feed_each(IDS[100:140]))
    assert engine.memory.cache == 2 * NativeEngine(model, 1).memory.cache


@pytest.mark.parametrize(("kind", "head"), [("q4_0", 32), ("q4_0", 40), ("f16", 32)])
def test_a_copied_beginning_has_the_bits_of_one_that_was_read(kind, head):
    model = model_of(kind, num_key_value_heads=2, head_dim=head)
    for name in kernels():
        alone = NativeEngine(model, 1, name).feed_each(IDS)
        engine = NativeBatchEngine(model, 3, 2, name)
        engine.feed([(0, IDS[:100]), (2, IDS[50:150])])
        for length in (1, 15, 33, 64, 100, 120):  # in the middle of a block, at its border, and more than there are
            engine.copy(0, 2, length)
            kept = min(length, 100)
            assert engine.length(2) == kept
            assert np.array_equal(engine.feed_each([(2, IDS[kept:])]), alone[kept:]), (name, length)
        assert np.array_equal(engine.feed([(0, IDS[100:])])[0], alone[-1])


def test_long_sequences_are_torchs_and_keep_their_bits_in_pieces_and_copies():
    model = model_of("q4_0", num_key_value_heads=2, head_dim=32, max_position_embeddings=450)
    ids = np.random.default_rng(2).integers(0, 333, 400).tolist()
    alone = NativeEngine(model, 1).feed_each(ids)
    assert distance(alone, torch_logits(model, ids)) < 2e-2
    engine = NativeBatchEngine(model, 2, 2)
    found = [engine.feed_each([(0, ids[start : start + 61])]) for start in range(0, 400, 61)]
    assert np.array_equal(np.concatenate(found), alone)
    for length in (127, 128, 129, 257):  # beside the borders of what lies together
        engine.copy(0, 1, length)
        assert np.array_equal(engine.feed_each([(1, ids[length : length + 20])]), alone[length : length + 20])


def test_work_that_cannot_be_taken_in_is_refused_and_changes_nothing():
    engine = NativeBatchEngine(model_of("q4_0"), 2, 1)
    expected = engine.feed([(0, IDS[:4]), (1, IDS[:9])])
    for work, said in (
        ([], "2 slots is fed some of them"),
        ([(2, [1])], "each once, not"),
        ([(-1, [1])], "each once, not"),
        ([(0, [1]), (0, [2])], "each once, not"),
        ([(0, [1]), (1, [])], "at least one token"),
        ([(0, [1]), (1, [333])], "0…332"),
        ([(0, [1]), (1, [1] * 192)], "200 tokens cannot hold 201"),
    ):
        for feed in (engine.feed, engine.feed_each):
            with pytest.raises(ValueError, match=said):
                feed(work)
    assert (engine.length(0), engine.length(1)) == (4, 9)
    engine.truncate(0, 3)
    engine.truncate(1, 8)
    assert np.array_equal(engine.feed([(0, IDS[3:4]), (1, IDS[8:9])]), expected)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"hidden_size": 72}], ids=str)
def test_any_number_of_threads_gives_the_same_bits(changes):
    model = model_of("q4_0", **changes)
    expected = NativeEngine(model, 1).feed_each(IDS)
    for threads in (2, 3, 7):
        engine = NativeEngine(model, threads)
        assert np.array_equal(engine.feed_each(IDS), expected)
        engine.truncate(100)
        one = NativeEngine(model, 1)
        one.feed(IDS[:100])
        assert np.array_equal(engine.feed(IDS[100:101]), one.feed(IDS[100:101]))


@pytest.mark.parametrize("in_step", [False, True])
def test_measuring_products_alone_leaves_no_trace(in_step):
    model = model_of("q4_0")
    measured, other = (NativeBatchEngine(model, 1, threads=2) for _ in range(2))
    expected = other.feed([(0, IDS)])
    measured.feed([(0, IDS[:5])])
    measured.multiply_only(1, in_step=in_step)
    assert np.array_equal(measured.feed([(0, IDS[5:])]), expected)


def test_products_in_step_end_with_the_heads():
    """Threads that wait for none write theirs over other matrices' at any time."""
    model, found = model_of("q4_0"), []
    for threads in (1, 3):
        engine = NativeBatchEngine(model, 1, threads)
        engine.feed([(0, IDS)])
        engine.multiply_only(1, in_step=True)
        found.append(engine._products[: engine.vocab_size].copy())
    assert np.array_equal(*found)
    assert np.abs(found[0]).max() > 0


def test_what_it_cannot_take_in_is_refused_and_changes_nothing():
    engine = NativeEngine(model_of("q4_0"), 1)
    expected = engine.feed(IDS[:4])
    engine.truncate(3)
    for ids, said in (
        ([], "at least one"),
        ([333], "0…332"),
        ([-1], "0…332"),
        ([1] * 198, "200 tokens cannot hold 201"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.feed(ids)
        with pytest.raises(ValueError, match=said):
            engine.feed_each(ids)
    assert np.array_equal(engine.feed(IDS[3:4]), expected)
    engine.feed([1] * 196)
    assert engine.length == engine.context_length


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "f16", "bf16", "f32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(kind, value):
    model = model_of(kind)
    name = "model.layers.1.self_attn.v_proj.weight"
    tensor = model.tensors[name]
    rows = tensor.rows.copy()
    number = {"bf16": np.array([value], np.float32).view(np.uint16)[1:], "f32": np.array([value], np.float32)}
    raw = number.get(kind, np.array([value], np.float16)).view(np.uint8)
    place = tensor.kind.bytes * 2  # the scale of the third block, or the third number
    rows[7, place : place + len(raw)] = raw
    broken = model.tensors | {name: dataclasses.replace(tensor, data=rows)}
    with pytest.raises(CorruptDataError, match=r"layers\.1\.self_attn\.v_proj\.weight' holds infinite numbers or NaN"):
        NativeEngine(dataclasses.replace(model, tensors=broken), 1)


def test_a_shared_weight_is_stored_and_counted_once():
    shared, unshared = (NativeEngine(model_of("q4_0", share=share), 1).memory for share in ("ffn", "none"))
    network = 3 * 224 * 160 * 18 // 32
    assert unshared.weights - shared.weights == 2 * network
    table = 333 * 160 * 18 // 32
    assert shared.weights - shared.read_per_token == table
    tied = model_of("q4_0", tie_word_embeddings=True)
    assert NativeEngine(tied, 1).memory.read_per_token == NativeEngine(tied, 1).memory.weights


def test_keys_and_values_take_half_the_memory_as_codes():
    model = model_of("q4_0", head_dim=32)
    positions, heads = 256, 3 * 4
    codes, floats = NativeEngine(model, 1), NativeEngine(model, 1, cache="f16")
    assert floats.memory.cache == heads * positions * 2 * 32 * 2
    # A key has a scale, with room for a second block's; a value's column has one, and ones beside its codes.
    assert codes.memory.cache == heads * positions * ((32 + 2) * 2 + (32 + 2) + 4)
    expected = torch_logits(model)
    assert distance(floats.feed_each(IDS), expected) < distance(codes.feed_each(IDS), expected) < 2e-2
    assert NativeEngine(model, 1, exact=True).memory.cache == floats.memory.cache
    assert NativeEngine(model_of("f16", head_dim=32), 1).memory.cache == floats.memory.cache


@pytest.fixture(scope="module")
def gguf(tokenizer_path, tmp_path_factory):
    tokenizer = load_tokenizer(tokenizer_path)
    model = model_of("q4_0", vocab_size=tokenizer.vocab_size, num_key_value_heads=2)
    path = tmp_path_factory.mktemp("native") / "model.gguf"
    write_model(path, model.shape, model.tensors, tokenizer, shared=True)
    return path


def test_a_gguf_file_opens_in_it_and_in_torch_on_wish(gguf):
    engine, _ = load_engine(gguf, threads=1)
    reference, _ = load_engine(gguf, TORCH)
    assert (engine.name, reference.name) == (NATIVE, TORCH)
    assert distance(engine.feed(IDS), reference.feed(IDS)) < 2e-2
    with pytest.raises(UsageError, match="--threads: 9999 where there are"):
        load_engine(gguf, threads=9999)


def test_a_gguf_file_opens_for_several_sequences(gguf):
    (batch, tokenizer), engine = (
        load_batch_engine(gguf, 3, threads=1, context_length=20),
        load_engine(gguf, threads=1)[0],
    )
    assert (batch.name, batch.slots, batch.context_length) == (NATIVE, 3, 20)
    assert batch.vocab_size == tokenizer.vocab_size == engine.vocab_size
    assert np.array_equal(batch.feed([(2, IDS[:5])])[0], engine.feed(IDS[:5]))
    with pytest.raises(ValueError, match="20 tokens cannot hold 21"):
        batch.feed([(2, IDS[:16])])
    with pytest.raises(UsageError, match="computes on the CPU here"):
        load_batch_engine(gguf, 3, NATIVE, device="cuda")
    with pytest.raises(UsageError, match=r"--context: 201 tokens; .* at most 200"):
        load_batch_engine(gguf, 3, context_length=201)


def decode_in_a_process(gguf, **environment) -> subprocess.CompletedProcess[str]:
    code = (
        environment.pop("before", "")
        + "import sys; from pathlib import Path; from mobillama.engine.load import load_engine\n"
        f"engine, _ = load_engine(Path({str(gguf)!r}), sys.argv[1], threads=1); engine.feed([1, 2, 3])\n"
        "print(engine.name, *sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, environment.pop("engine", "auto")],
        env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_decoding_loads_no_torch(gguf):
    name, *loaded = decode_in_a_process(gguf).stdout.split()
    assert name == NATIVE
    assert {"torch", "transformers", "onnxruntime", "yaml", "rich"}.isdisjoint(loaded)


def test_without_a_compiler_torch_decodes_and_one_line_says_so(gguf, tmp_path):
    for compiler, said in (("/absent/c++", "is no program here"), ("false", "the C++ compiler 'false' failed")):
        run = decode_in_a_process(gguf, MOBILLAMA_CACHE=str(tmp_path), CXX=compiler)
        assert run.stdout.split()[0] == TORCH, run.stderr
        *before, line = run.stderr.splitlines()
        assert said in line and "torch decodes instead" in line
        assert len(before) == (compiler == "false")  # which is asked to compile
    refused = decode_in_a_process(gguf, MOBILLAMA_CACHE=str(tmp_path), CXX="false", engine="native")
    assert f"{UsageError.__name__}: {gguf}: the C++ compiler 'false' failed" in refused.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_without_compiler_and_torch_both_remedies_are_named(gguf, tmp_path):
    absent = 'import sys; sys.modules["torch"] = None\n'
    run = decode_in_a_process(gguf, MOBILLAMA_CACHE=str(tmp_path), CXX="/absent/c++", before=absent)
    *_, line = run.stderr.splitlines()
    assert line.endswith(
        f"UsageError: {gguf}: CXX names '/absent/c++', which is no program here; install g++ or clang++, or unset it; or "
        "decode with torch: pip install 'mobillama[train]'"
    )


def test_a_damaged_library_in_the_cache_is_compiled_again(gguf, tmp_path):
    library_file = tmp_path / "native" / library_name()
    library_file.parent.mkdir()
    library_file.write_bytes(b"cut off by a full disk")
    run = decode_in_a_process(gguf, MOBILLAMA_CACHE=str(tmp_path))
    assert run.stdout.split()[0] == NATIVE, run.stderr
    assert library_file.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["sha256-0123", "model.GGUF"])
def test_a_gguf_file_is_known_by_its_first_bytes_whatever_its_name(gguf, tmp_path, name):
    shutil.copyfile(gguf, tmp_path / name)
    engine, tokenizer = load_engine(tmp_path / name, threads=1)
    assert (engine.name, engine.vocab_size) == (NATIVE, tokenizer.vocab_size)


def test_what_is_no_model_is_told_before_a_library_is_missed(tmp_path):
    (tmp_path / "text").write_text("GGU")
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, said in (("text", "is neither a GGUF file nor a model directory"), ("folder.gguf", "is no file")):
        with pytest.raises(UsageError, match=said):
            load_engine(tmp_path / name)
    with pytest.raises(UsageError, match="is no file; give a GGUF file"):
        load_engine(tmp_path / "pipe.gguf")


def test_a_file_that_changes_while_it_is_read_is_an_error_and_not_the_end(gguf, tmp_path):
    path = tmp_path / "changing.gguf"
    content = gguf.read_bytes()
    for change in (
        lambda: os.truncate(path, len(content) // 2),
        lambda: os.truncate(path, 0),
        lambda: os.utime(path, ns=(1, 1)),
    ):
        path.write_bytes(content)
        model = read_model(path)
        change()
        with pytest.raises(CorruptDataError, match=r"changing\.gguf: was (cut short|changed) while it was read"):
            NativeEngine(model, 1)


def test_what_becomes_of_the_file_once_it_is_loaded_is_all_the_same(gguf, tmp_path):
    path = tmp_path / "gone.gguf"
    path.write_bytes(gguf.read_bytes())
    engine = NativeEngine.load(path, 1)
    os.truncate(path, 100)
    path.unlink()
    assert np.array_equal(engine.feed(IDS), NativeEngine.load(gguf, 1).feed(IDS))


def test_more_threads_than_rows_compute_the_same():
    model = model_of("q4_0", head_dim=32)
    assert np.array_equal(NativeEngine(model, 40).feed(IDS[:5]), NativeEngine(model, 1).feed(IDS[:5]))


def test_libraries_that_nobody_loads_any_more_are_removed(tmp_path):
    old, other, foreign = (tmp_path / name for name in ("libmobillama-0.so", "libmobillama-1.so", "libmine.so"))
    for file in (old, other, foreign):
        file.touch()
    for file in (old, foreign):
        os.utime(file, (1, 1))
    _remove_unused(tmp_path)
    assert sorted(tmp_path.iterdir()) == [foreign, other]


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f32"])
def test_numbers_that_overflow_end_nothing(kind):
    model = model_of(kind, head_dim=32)
    norms = {name: its for name, its in model.tensors.items() if name.endswith("layernorm.weight")}
    huge = {
        name: dataclasses.replace(its, data=encode(np.full((1, 160), 3e38), its.kind)) for name, its in norms.items()
    }
    broken = dataclasses.replace(model, tensors=model.tensors | huge)
    for name in kernels():
        engine = NativeBatchEngine(broken, 2, 1, name)
        assert not np.isfinite(engine.feed([(0, IDS[:40]), (1, IDS[:3])])).all()


def test_what_overflowed_is_forgotten_with_its_tokens():
    model = model_of("q4_0", head_dim=32)
    embedding = np.random.default_rng(4).normal(0, 0.04, model.tensors[EMBEDDING].shape).astype(np.float32)
    embedding[:, 5] = np.arange(333) == 7  # the one token that the norm's huge weight is multiplied with
    norm = np.ones((1, 160), np.float32)
    norm[0, 5] = 3e38
    changes = {EMBEDDING: embedding, "model.layers.0.input_layernorm.weight": norm}
    tensors = {
        name: Tensor(name, model.tensors[name].shape, TYPES["f32"], encode(its, TYPES["f32"]))
        for name, its in changes.items()
    }
    model = dataclasses.replace(model, tensors=model.tensors | tensors)
    ids = [number for number in IDS if number != 7][:60]
    for name in kernels():
        expected = NativeEngine(model, 1, name).feed_each(ids)
        assert np.isfinite(expected).all()
        engine = NativeBatchEngine(model, 2, 1, name)
        assert not np.isfinite(engine.feed_each([(0, [*ids[:33], 7, *ids[33:50]])])[33:]).all()
        engine.copy(0, 1, 33)
        engine.truncate(0, 33)
        for slot in range(2):
            found = np.concatenate([engine.feed_each([(slot, [number])]) for number in ids[33:]])
            assert np.array_equal(found, expected[33:])
