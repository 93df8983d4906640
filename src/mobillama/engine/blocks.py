"""Number formats of weights in GGUF files: plain floats, and blocks of 32 numbers that share a scale. Imports no torch.

The formats and their rounding are ggml's (``block_q8_0``, ``block_q4_0``, ``block_q4_1`` and their reference quantisers).
Blocks run along the last axis: a row of ``c`` numbers is ``c / 32`` blocks, so rows can be cut, copied and reordered without
decoding them.

Shapes: r rows · c columns · g blocks of a row · k the 32 numbers of a block · b bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.errors import UsageError

BLOCK = 32
_CHUNK = 1 << 20  # numbers converted at once, so that temporaries stay small


@dataclass(frozen=True)
class BlockType:
    """A number format: how many numbers and bytes a block has, and its numbers in GGUF files."""

    name: str
    """ggml's name."""
    code: int
    """ggml's number of the type (``ggml_type``)."""
    file_type: int
    """llama.cpp's number of a file that is mostly of this type (``llama_ftype``)."""
    values: int
    """Numbers in a block."""
    bytes: int
    """Bytes of a block."""

    @property
    def is_quantized(self) -> bool:
        """Whether numbers share a scale."""
        return self.values > 1

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row.

        Raises:
            UsageError: the row is no whole number of blocks.
        """
        if columns % self.values:
            raise UsageError(
                f"rows of {columns} numbers cannot be stored as {self.name}: it takes {self.values} at a time"
            )
        return columns // self.values * self.bytes


F32 = BlockType("F32", 0, 0, 1, 4)
F16 = BlockType("F16", 1, 1, 1, 2)
BF16 = BlockType("BF16", 30, 32, 1, 2)
Q8_0 = BlockType("Q8_0", 8, 7, BLOCK, 2 + 32)
Q4_0 = BlockType("Q4_0", 2, 2, BLOCK, 2 + 16)
Q4_1 = BlockType("Q4_1", 3, 3, BLOCK, 2 + 2 + 16)
TYPES = {kind.name.lower(): kind for kind in (F32, F16, BF16, Q8_0, Q4_0, Q4_1)}


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix taken apart. A number is ``scale · (code - zero) + minimum``."""

    codes_rgk: NDArray[Any]
    """Q8_0: int8 (-127…127), zero 0. Q4_0: uint8 (0…15), zero 8. Q4_1: uint8 (0…15), zero 0."""
    scale_rg: NDArray[np.float16]
    minimum_rg: NDArray[np.float16] | None = None
    """Only Q4_1 has one."""


def pack(blocks: Blocks, kind: BlockType) -> NDArray[np.uint8]:
    """Return the bytes (r, b) of a quantized matrix; the inverse of :func:`unpack`."""
    rows, groups = blocks.scale_rg.shape
    out_rgb = np.empty((rows, groups, kind.bytes), np.uint8)
    out_rgb[..., :2] = _half_bytes(blocks.scale_rg)
    if kind is Q8_0:
        out_rgb[..., 2:] = blocks.codes_rgk.astype(np.int8, copy=False).view(np.uint8)
    else:
        start = 2
        if kind is Q4_1:
            assert blocks.minimum_rg is not None
            out_rgb[..., 2:4], start = _half_bytes(blocks.minimum_rg), 4
        codes_rgk = blocks.codes_rgk.astype(np.uint8, copy=False)
        out_rgb[..., start:] = codes_rgk[..., :16] | codes_rgk[..., 16:] << 4
    return out_rgb.reshape(rows, groups * kind.bytes)


def unpack(data_rb: NDArray[np.uint8], kind: BlockType) -> Blocks:
    """Return codes, scales and minima of a quantized matrix."""
    blocks_rgb = data_rb.reshape(len(data_rb), -1, kind.bytes)
    scale_rg = _half_of(blocks_rgb[..., :2])
    if kind is Q8_0:
        return Blocks(blocks_rgb[..., 2:].view(np.int8), scale_rg)
    minimum_rg = _half_of(blocks_rgb[..., 2:4]) if kind is Q4_1 else None
    pairs = blocks_rgb[..., 4 if kind is Q4_1 else 2 :]
    return Blocks(np.concatenate([pairs & 15, pairs >> 4], axis=-1), scale_rg, minimum_rg)


def encode(values_rc: NDArray[np.floating[Any]], kind: BlockType) -> NDArray[np.uint8]:
    """Return the bytes (r, b) of a matrix: rounded to nearest, as ggml's reference quantisers round.

    Raises:
        UsageError: a row is no whole number of blocks, or a number is not finite, by itself or in the format.
    """

    def convert(values_rc: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        if not np.isfinite(values_rc).all():
            raise UsageError("holds infinite numbers or NaN; take an earlier checkpoint")
        return _ENCODERS[kind.name](values_rc)

    return _by_rows(values_rc, (kind.row_bytes(values_rc.shape[1]),), np.uint8, convert)


def decode(data_rb: NDArray[np.uint8], kind: BlockType) -> NDArray[np.float32]:
    """Return the numbers (r, c) that bytes stand for."""
    columns = data_rb.shape[1] // kind.bytes * kind.values
    convert = _DECODERS[kind.name]
    return _by_rows(data_rb, (columns,), np.float32, convert)


def _by_rows(source: NDArray[Any], shape: tuple[int, ...], dtype: Any, convert: Callable[[Any], Any]) -> NDArray[Any]:
    rows, width = len(source), max(1, source.shape[1])
    out = np.empty((rows, *shape), dtype)
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        out[start : start + step] = convert(source[start : start + step])
    return out


def _fit_q8_0(values_rgk: NDArray[np.float32]) -> Blocks:
    scale_rg = np.abs(values_rgk).max(axis=-1) / np.float32(127)
    scaled = values_rgk * _inverse(scale_rg)[..., None]
    # Halves away from zero, as C's roundf; numpy's own rounding takes them to even.
    whole = np.trunc(scaled)
    whole += np.copysign(np.abs(scaled - whole) >= np.float32(0.5), scaled)
    return Blocks(whole.astype(np.int8), _half(scale_rg))


def _fit_q4_0(values_rgk: NDArray[np.float32]) -> Blocks:
    place_rg1 = np.abs(values_rgk).argmax(axis=-1, keepdims=True)
    scale_rg = np.take_along_axis(values_rgk, place_rg1, axis=-1)[..., 0] / np.float32(-8)
    scaled = values_rgk * _inverse(scale_rg)[..., None]
    scaled += np.float32(8.5)
    return Blocks(np.minimum(scaled, 15, out=scaled).astype(np.uint8), _half(scale_rg))


def _fit_q4_1(values_rgk: NDArray[np.float32]) -> Blocks:
    minimum_rg = values_rgk.min(axis=-1)
    scale_rg = (values_rgk.max(axis=-1) - minimum_rg) / np.float32(15)
    scaled = (values_rgk - minimum_rg[..., None]) * _inverse(scale_rg)[..., None]
    scaled += np.float32(0.5)
    return Blocks(np.minimum(scaled, 15, out=scaled).astype(np.uint8), _half(scale_rg), _half(minimum_rg))


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(scale) < np.finfo(np.float32).tiny, np.float32(0), np.float32(1) / scale)


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError("holds numbers beyond float16; choose bf16")
    return half


def _quantizer(kind: BlockType, fit: Callable[[NDArray[np.float32]], Blocks]) -> Callable[[Any], NDArray[np.uint8]]:
    def convert(values_rc: NDArray[Any]) -> NDArray[np.uint8]:
        values = np.ascontiguousarray(values_rc, np.float32)
        return pack(fit(values.reshape(len(values), -1, BLOCK)), kind)

    return convert


def _dequantizer(kind: BlockType) -> Callable[[Any], NDArray[np.float32]]:
    def convert(data_rb: NDArray[np.uint8]) -> NDArray[np.float32]:
        blocks = unpack(np.ascontiguousarray(data_rb), kind)
        values_rgk = blocks.codes_rgk.astype(np.float32)
        if kind is Q4_0:
            values_rgk -= 8
        values_rgk *= blocks.scale_rg.astype(np.float32)[..., None]
        if blocks.minimum_rg is not None:
            values_rgk += blocks.minimum_rg.astype(np.float32)[..., None]
        return values_rgk.reshape(len(values_rgk), -1)

    return convert


def _to_bf16(values_rc: NDArray[Any]) -> NDArray[np.uint8]:
    bits = np.ascontiguousarray(values_rc, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
    return rounded.astype(np.uint16).view(np.uint8)


def _half_bytes(half_rg: NDArray[np.float16]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(half_rg)[..., None].view(np.uint8)


def _half_of(raw_rg2: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw_rg2).view(np.float16)[..., 0]


_ENCODERS: dict[str, Callable[[Any], NDArray[np.uint8]]] = {
    "F32": lambda values: np.ascontiguousarray(values, np.float32).view(np.uint8),
    "F16": lambda values: _half(np.ascontiguousarray(values, np.float32)).view(np.uint8),
    "BF16": _to_bf16,
    "Q8_0": _quantizer(Q8_0, _fit_q8_0),
    "Q4_0": _quantizer(Q4_0, _fit_q4_0),
    "Q4_1": _quantizer(Q4_1, _fit_q4_1),
}
_DECODERS: dict[str, Callable[[Any], NDArray[np.float32]]] = {
    "F32": lambda data: np.ascontiguousarray(data).view(np.float32),
    "F16": lambda data: np.ascontiguousarray(data).view(np.float16).astype(np.float32),
    "BF16": lambda data: (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    "Q8_0": _dequantizer(Q8_0),
    "Q4_0": _dequantizer(Q4_0),
    "Q4_1": _dequantizer(Q4_1),
}
