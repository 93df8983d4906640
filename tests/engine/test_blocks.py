"""Number formats agree bit for bit with the gguf package, and rounding stays within half a step."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobillama.engine import blocks
from mobillama.engine.blocks import TYPES, decode, encode, pack, unpack
from mobillama.errors import UsageError

QUANTIZED = [kind for kind in TYPES.values() if kind.is_quantized]


def hard_values() -> np.ndarray:
    """Weights of several scales, ties, zeros, constant blocks, outliers of either sign."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 256)).astype(np.float32) * np.float32(10) ** rng.integers(-6, 4, (300, 1))
    values[0], values[1], values[2] = 0, 1.5, -0.25
    values[3] = np.resize([-1, 1], 256)  # two largest of the same size
    values[4] = np.arange(256) / 2  # halves
    values[5, ::32] = 1000
    values[6, 5::32] = -1000
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_bytes_and_numbers_are_those_of_the_gguf_package(kind, monkeypatch):
    values, theirs = hard_values(), GGMLQuantizationType(kind.code)
    monkeypatch.setattr(blocks, "_CHUNK", 7 * 256)  # several chunks, the last one short
    if kind.name == "F16":
        values = values.clip(-60000, 60000)
    expected = quants.quantize(values, theirs).view(np.uint8)
    ours = encode(values, kind)
    assert ours.shape == (300, kind.row_bytes(256))
    assert np.array_equal(ours, expected)
    reference = quants.dequantize(
        expected
        if kind.is_quantized or kind.name == "BF16"
        else expected.view(np.float16 if kind.name == "F16" else np.float32),
        theirs,
    )
    assert np.array_equal(decode(ours, kind), reference)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_pack_and_unpack_are_inverse_and_a_number_is_scale_times_code(kind):
    data = encode(hard_values(), kind)
    parts = unpack(data, kind)
    assert np.array_equal(pack(parts, kind), data)
    zero = 8 if kind.name == "Q4_0" else 0
    numbers = parts.scale_rg[..., None].astype(np.float32) * (parts.codes_rgk.astype(np.float32) - zero)
    if parts.minimum_rg is not None:
        numbers += parts.minimum_rg[..., None].astype(np.float32)
    assert np.array_equal(decode(data, kind), numbers.reshape(300, 256))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (3, 64), elements=st.floats(-1000, 1000, width=32)))
def test_rounding_error_is_within_half_a_step(values):
    for kind in QUANTIZED:
        data = encode(values, kind)
        scale = np.abs(unpack(data, kind).scale_rg.astype(np.float64)).repeat(32, axis=1)
        steps = 1.0 if kind.name == "Q4_0" else 0.5  # the far end of Q4_0's range is one step short
        # Scales and minima are themselves rounded to 11 bits, which at most 127 steps of them feel.
        slack = np.abs(values).max(axis=1, keepdims=True) * 2e-3 + 1e-4
        assert (np.abs(decode(data, kind) - values) <= steps * scale + slack).all()


def test_what_a_format_cannot_hold_is_refused():
    with pytest.raises(UsageError, match="33 numbers cannot be stored as Q4_0"):
        encode(np.zeros((2, 33), np.float32), TYPES["q4_0"])
    with pytest.raises(UsageError, match="beyond float16"):
        encode(np.full((2, 32), 1e6, np.float32), TYPES["f16"])
    with pytest.raises(UsageError, match="beyond float16"):
        encode(np.linspace(-1e9, 1e9, 64, dtype=np.float32)[None], TYPES["q4_1"])
    for kind in TYPES.values():
        with pytest.raises(UsageError, match="NaN; take an earlier checkpoint"):
            encode(np.full((1, 32), np.nan, np.float32), kind)
