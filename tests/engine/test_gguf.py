"""GGUF files: what we write the gguf package reads, and back; headers that lie are refused before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from mobillama.engine.blocks import TYPES, decode, encode
from mobillama.engine.gguf import Tensor, read_gguf, write_gguf
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError

METADATA = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "a.flag": True,
    "a.float": 0.5,
    "a.large": 1 << 40,
    "a.negative": -3,
    "a.words": ["", "héllo", "▁the", "x" * 300],
    "a.types": np.array([1, 6, 3], np.int32),
    "a.scores": np.array([0.0, -1.5], np.float32),
}


def tensors() -> list[Tensor]:
    values = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    made = [
        Tensor(f"{name}.weight", (5, 64), kind, encode(part, kind))
        for (name, kind), part in zip(TYPES.items(), np.resize(values, (len(TYPES), 5, 64)), strict=True)
    ]
    f32 = TYPES["f32"]
    return [*made, Tensor("norm", (7,), f32, lambda: encode(np.arange(7.0)[None], f32)), Tensor(
        "cube", (3, 5, 64), f32, encode(values.reshape(15, 64), f32))]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, tensors())
    return tmp_path / "a.gguf"


def test_the_gguf_package_reads_what_we_write(written):
    theirs = GGUFReader(written)
    fields = {key: theirs.fields[key].contents() for key in METADATA}
    assert fields == {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in METADATA.items()}
    assert theirs.fields["a.float"].types == [GGUFValueType.FLOAT32]
    assert theirs.fields["a.large"].types == [GGUFValueType.UINT64]
    for ours, other in zip(tensors(), theirs.tensors, strict=True):
        assert (ours.name, ours.shape[::-1]) == (other.name, tuple(other.shape))
        assert other.tensor_type == ours.kind.code
        assert np.array_equal(other.data.view(np.uint8).reshape(-1), ours.rows.reshape(-1))


def test_what_we_read_is_what_was_written(written):
    ours = read_gguf(written)
    assert ours.metadata["a.words"][1:3] == ["héllo", "▁the"]
    assert {k: v for k, v in ours.metadata.items() if not isinstance(v, np.ndarray) and k != "a.words"} == {
        k: v for k, v in METADATA.items() if not isinstance(v, np.ndarray) and k != "a.words"
    }
    assert list(ours.metadata["a.words"]) == METADATA["a.words"]
    assert np.array_equal(ours.metadata["a.types"], METADATA["a.types"])
    for before, after in zip(tensors(), ours.tensors.values(), strict=True):
        assert (before.name, before.shape, before.kind) == (after.name, after.shape, after.kind)
        assert np.array_equal(before.rows, after.rows)


def test_we_read_what_the_gguf_package_writes(tmp_path):
    writer = GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint8("a.byte", 7)
    writer.add_float64("a.double", 0.1)
    writer.add_array("a.flags", [True, False])
    writer.add_custom_alignment(64)
    writer.add_tensor("x", np.ones((3, 4), np.float16))
    writer.add_tensor("y", encode(np.full((2, 32), 127.0), TYPES["q8_0"]), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_gguf(tmp_path / "b.gguf")
    assert (ours.metadata["a.byte"], ours.metadata["a.double"]) == (7, 0.1)
    assert ours.metadata["a.flags"].tolist() == [True, False]
    assert ours.tensors["x"].shape == (3, 4)
    assert np.array_equal(decode(ours.tensors["y"].rows, TYPES["q8_0"]), np.full((2, 32), 127))


def header(version=3, tensors=0, keys=0, rest=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest + bytes(64)


def key(name: str, code: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", code) + value


def one_tensor(name=b"t", dims=(32, 2), code=0, offset=0, n_dims=None) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return header(3, 1, 0, head + struct.pack(f"<{len(dims)}QIQ", *dims, code, offset)) + bytes(256)


LIES = {
    "not a GGUF file": b"PK\3\4" + bytes(60),
    "version 1;": header(1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "'version' needs|version needs 4 bytes": b"GGUF\3",
    "states 4,294,967,295 tensors": header(3, 0xFFFFFFFF),
    "states 18,446,744,073,709,551,615 metadata": header(3, 0, (1 << 64) - 1),
    "the length of a metadata key": header(3, 0, 1, struct.pack("<Q", 1 << 62)),
    "unknown type 77": header(3, 0, 1, key("a", 77, b"")),
    "strings, more than the file": header(3, 0, 1, key("a", 9, struct.pack("<IQ", 8, 1 << 50))),
    "ends behind the file": header(3, 0, 1, key("a", 9, struct.pack("<IQQ", 8, 3, 1 << 60))),
    "'a' needs": header(3, 0, 1, key("a", 9, struct.pack("<IQ", 4, 1 << 61))),
    "has the unknown type 9": header(3, 0, 1, key("a", 9, struct.pack("<IQ", 9, 1))),  # arrays of arrays
    "neither 0 nor 1": header(3, 0, 1, key("a", 7, b"\2")),
    "stands twice": header(3, 0, 2, key("a", 0, b"\2") * 2),
    "no UTF-8": header(3, 0, 1, key("a", 8, struct.pack("<Q", 2) + b"\xff\xff")),
    "no power of two": header(3, 0, 1, key("general.alignment", 4, struct.pack("<I", 24))),
    "states 9 dimensions": one_tensor(n_dims=9),
    "has the unknown type 99": one_tensor(code=99),
    "quantized as Q4_K, which is not read here; take the file": one_tensor(code=12),
    "an empty dimension": one_tensor(dims=(0, 2)),
    "no whole number of Q4_0 blocks": one_tensor(dims=(31, 2), code=2),
    "states offset 32 where 0": one_tensor(offset=32),
    "bytes behind the file": one_tensor(dims=(1 << 60, 1 << 60)),
}  # fmt: skip


@pytest.mark.parametrize("message", LIES)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(message, tmp_path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[message])
    tracemalloc.start()
    with pytest.raises((CorruptDataError, UsageError), match=message) as caught:
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_long_text_is_read_whole_and_what_is_no_text_costs_little(tmp_path):
    text = "é🦙 and so on; " * 50_000
    write_gguf(tmp_path / "t.gguf", {"template": text, "words": [text]}, [])
    ours = read_gguf(tmp_path / "t.gguf")
    assert ours.metadata["template"] == text and list(ours.metadata["words"]) == [text]
    raw = "é".encode() * 500_000 + b"\xff" * 64
    (tmp_path / "t.gguf").write_bytes(header(3, 0, 1, key("a", 8, struct.pack("<Q", len(raw)) + raw)))
    (tmp_path / "u.gguf").write_bytes(header(3, 0, 1, key("a", 8, struct.pack("<Q", len(raw)) + b"\xff" + raw[1:])))
    for name, most in (("t", 2.0), ("u", 0.1)):
        tracemalloc.start()
        with pytest.raises(CorruptDataError, match="no UTF-8"):
            read_gguf(tmp_path / f"{name}.gguf")
        assert tracemalloc.get_traced_memory()[1] < most * len(raw)
        tracemalloc.stop()


def test_every_truncation_is_refused(written, tmp_path):
    whole, path = written.read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(0, 900, 7), len(whole) - 40]:
        path.write_bytes(whole[:size])
        with pytest.raises(MobiLlamaError, match=r"cut\.gguf"):
            read_gguf(path)
    with pytest.raises(UsageError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")


def test_a_large_vocabulary_costs_no_more_than_its_bytes(tmp_path):
    for word in ("ab", ""):
        write_gguf(tmp_path / "v.gguf", {"tokens": [word] * 300_000}, [])
        tracemalloc.start()
        ours = read_gguf(tmp_path / "v.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1.1 * (tmp_path / "v.gguf").stat().st_size
        tracemalloc.stop()
        assert len(ours.metadata["tokens"]) == 300_000 and ours.metadata["tokens"][-1] == word


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_headers_end_in_our_errors_only(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    seed = folder / "seed.gguf"
    if not seed.is_file():
        write_gguf(seed, METADATA, tensors())
    raw = bytearray(seed.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 1200))
        raw[place] = data.draw(st.integers(0, 255))
    mutated = folder / "mutated.gguf"
    mutated.write_bytes(raw)
    try:
        ours = read_gguf(mutated)
        [list(value) for value in ours.metadata.values() if not isinstance(value, (int, float, str))]
    except MobiLlamaError:
        return
    assert sum(tensor.rows.nbytes for tensor in ours.tensors.values()) <= len(raw)


def test_a_file_is_replaced_whole_or_not_at_all(written):
    before = written.read_bytes()

    def breaks() -> np.ndarray:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_gguf(written, {}, [Tensor("x", (32,), TYPES["f32"], breaks)])
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]
