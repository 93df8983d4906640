"""GGUF files: metadata, read through a memory map, and tensors, read when they are asked for; written as a stream. Imports no
torch.

The format is ggml's (docs/gguf.md there), versions 2 and 3, little-endian. A header may lie: every length is checked against
the bytes that are left before anything is made of it, so what is allocated stays below the size of the file. Tensors are
copied out of the file: a program that touches a map of a file that was cut short is killed by the system.
"""

from __future__ import annotations

import codecs
import functools
import io
import mmap
import os
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from mobillama.engine.blocks import TYPES, BlockType
from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.files import replaced_file

MAGIC = b"GGUF"
ALIGNMENT = 32
_MAX_KEYS, _MAX_TENSORS, _MAX_NAME, _MAX_DIMENSIONS = 4096, 16384, 64, 4
_PIECE = 1 << 13
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_CODE_OF_SCALAR = {np.dtype(name): code for code, name in _SCALARS.items()}
_KINDS = {kind.code: kind for kind in TYPES.values()}
# Types of ggml that this project does not decode, by their number.
_OTHER_KINDS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file, its numbers as encoded bytes.

    Args:
        name: up to 63 bytes.
        shape: as numpy counts: the last axis is contiguous (the file states it reversed).
        kind: how numbers are encoded.
        data: rows (r, b) of encoded bytes, r the product of all axes but the last; or what reads or makes them.
    """

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    data: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]

    @property
    def rows(self) -> NDArray[np.uint8]:
        """The encoded bytes (r, b), read or made anew at each call where they are not held.

        Raises:
            CorruptDataError: the file was changed or cut short after it was opened.
        """
        return self.data() if callable(self.data) else self.data

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded numbers."""
        return tensor_bytes(self.shape, self.kind)


def tensor_bytes(shape: Sequence[int], kind: BlockType) -> int:
    """Return the bytes of a tensor.

    Raises:
        UsageError: its rows are no whole number of blocks.
    """
    *outer, columns = shape
    return int(np.prod(outer, dtype=object)) * kind.row_bytes(columns)


class Strings(Sequence[str]):
    """An array of strings in a file: decoded one by one, when asked for."""

    def __init__(self, content: mmap.mmap | bytes, starts: Sequence[int], place: str) -> None:
        self._content, self._starts, self._place = content, starts, place

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._string(start) for start in self._starts[index]]
        return self._string(self._starts[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._string, self._starts)

    def _string(self, start: int) -> str:
        (length,) = _U64.unpack_from(self._content, start - 8)
        try:
            return _text(self._content, start, start + length)
        except UnicodeDecodeError:
            raise CorruptDataError(f"{self._place}: holds a string that is no UTF-8; {_REMEDY}") from None


def _text(content: mmap.mmap | bytes, start: int, end: int) -> str:
    """Return UTF-8 text; in pieces where it is long, so that bytes that are no text fail before they are all copied."""
    if end - start <= _PIECE:
        return content[start:end].decode()
    pieces = (content[place : min(end, place + _PIECE)] for place in range(start, end, _PIECE))
    return "".join(codecs.iterdecode(pieces, "utf-8"))


@dataclass(frozen=True)
class GGUF:
    """What a GGUF file holds; arrays are views of the file."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, strings, booleans; arrays are numpy arrays or :class:`Strings`."""
    tensors: dict[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Tell whether a file is a GGUF file by its first bytes, or means to be one by its name."""
    if path.suffix == ".gguf":
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUF:
    """Open a GGUF file.

    Raises:
        UsageError: there is no such file, it is no GGUF, of an unknown version, or holds types that are not decoded here.
        CorruptDataError: its header contradicts itself or its size.
    """
    if not path.is_file():
        raise UsageError(f"{path}: {'is no file' if path.exists() else 'no such file'}; give a GGUF file")
    file = open(path, "rb", buffering=0)  # noqa: SIM115 tensors are read from it as long as they are held
    if file.read(4) != MAGIC:
        raise UsageError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Reader(path, content, _Source(path, file)).read()


class _Source:
    """The open file that tensors are read from, as it was when it was opened."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self._path, self._file, self._lock = path, file, threading.Lock()
        self._changed = os.fstat(file.fileno()).st_mtime_ns

    def read(self, start: int, rows: int, width: int) -> NDArray[np.uint8]:
        rows_rb = np.empty((rows, width), np.uint8)
        left = rows_rb.data.cast("B")
        with self._lock:
            self._file.seek(start)
            while left:
                count = self._file.readinto(left)
                if not count:
                    raise CorruptDataError(f"{self._path}: was cut short while it was read; {_REMEDY}")
                left = left[count:]
            if os.fstat(self._file.fileno()).st_mtime_ns != self._changed:
                raise CorruptDataError(f"{self._path}: was changed while it was read; open it again when it is whole")
        return rows_rb


_REMEDY = "fetch or export the file again"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap, source: _Source) -> None:
        self.path, self.content, self.size, self.at = path, content, len(content), len(MAGIC)
        self.source = source

    def read(self) -> GGUF:
        version = self.number(_U32, "version")
        if version not in (2, 3):
            big = version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
            what = "is written for big-endian machines" if big else f"has version {version}; versions 2 and 3 are known"
            raise UsageError(f"{self.path}: {what}; convert the model again with a current llama.cpp")
        # The least that a tensor and a key take: their name's length and letter, and what follows.
        tensors = self.count("tensors", 8 + 1 + 4 + 8 + 4 + 8, _MAX_TENSORS)
        metadata = self.metadata(self.count("metadata keys", 8 + 1 + 4 + 1, _MAX_KEYS))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            self.fail(f"general.alignment is {alignment!r:.40}, no power of two")
        return GGUF(self.path, metadata, self.tensors(tensors, alignment))

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a metadata key", 1 << 16)
            if key in found:
                self.fail(f"metadata key '{key:.80}' stands twice")
            found[key] = self.value(self.number(_U32, key), key)
        return found

    def value(self, code: int, key: str) -> Any:
        if code == _STRING:
            return self.string(key, self.size)
        if code == _ARRAY:
            return self.array(key)
        return self.scalars(code, 1, key)[0].item()

    def array(self, key: str) -> NDArray[Any] | Strings:
        code, count = self.number(_U32, key), self.number(_U64, key)
        if code != _STRING:
            return self.scalars(code, count, key)
        if count > (self.size - self.at) // 8:
            self.fail(f"'{key:.80}' states {count:,} strings, more than the file has room for")
        starts = array("q", [0]) * count  # made in one piece: growing would take twice the room for a moment
        at, last, unpack = self.at, self.size - 8, _U64.unpack_from
        for number in range(count):
            if at > last:
                self.fail(f"'{key:.80}' ends behind the file")
            starts[number] = at = at + 8
            at += unpack(self.content, at - 8)[0]
        if at > self.size:
            self.fail(f"'{key:.80}' ends behind the file")
        self.at = at
        return Strings(self.content, starts, f"{self.path}: '{key}'")

    def scalars(self, code: int, count: int, key: str) -> NDArray[Any]:
        if code not in _SCALARS:
            self.fail(f"'{key:.80}' has the unknown type {code}")
        dtype = np.dtype(_SCALARS[code])
        start = self.take(count * dtype.itemsize, f"'{key:.80}'")
        if code == _BOOL:
            raw = np.frombuffer(self.content, np.uint8, count, start)
            if (raw > 1).any():
                self.fail(f"'{key:.80}' holds a truth value that is neither 0 nor 1")
        return np.frombuffer(self.content, dtype, count, start)

    def tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        headers: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
        for _ in range(count):
            name = self.string("a tensor's name", _MAX_NAME)
            if name in headers:
                self.fail(f"tensor '{name}' stands twice")
            headers[name] = self.tensor_header(name)
        data = self.at + -self.at % alignment
        found, end = {}, 0
        for name, (shape, kind, offset) in headers.items():
            size = tensor_bytes(shape, kind)
            if offset != end:
                self.fail(f"tensor '{name}' states offset {offset:,} where {end:,} follows from the tensors before it")
            if data + offset + size > self.size:
                missing = data + offset + size - self.size
                self.fail(f"tensor '{name}' ends {missing:,} bytes behind the file, which is truncated or lies")
            width = kind.row_bytes(shape[-1])
            read = functools.partial(self.source.read, data + offset, size // width, width)
            found[name] = Tensor(name, shape, kind, read)
            end = offset + size + -size % alignment
        return found

    def tensor_header(self, name: str) -> tuple[tuple[int, ...], BlockType, int]:
        dimensions = self.number(_U32, name)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            self.fail(f"tensor '{name}' states {dimensions:,} dimensions")
        shape = tuple(self.number(_U64, name) for _ in range(dimensions))[::-1]
        code, offset = self.number(_U32, name), self.number(_U64, name)
        if code not in _KINDS:
            if code not in _OTHER_KINDS:
                self.fail(f"tensor '{name}' has the unknown type {code}")
            raise UsageError(
                f"{self.path}: tensor '{name}' is quantized as {_OTHER_KINDS[code]}, which is not read here; take the file "
                f"of the same model in {', '.join(kind.name for kind in TYPES.values())}"
            )
        if not all(shape):
            self.fail(f"tensor '{name}' has an empty dimension: {shape}")
        if shape[-1] % _KINDS[code].values:
            self.fail(f"tensor '{name}' has rows of {shape[-1]:,}, no whole number of {_KINDS[code].name} blocks")
        return shape, _KINDS[code], offset

    def count(self, what: str, least_bytes: int, most: int) -> int:
        count = self.number(_U64, what)
        if count > min(most, self.size // least_bytes):
            self.fail(f"states {count:,} {what}, more than the file has room for (and at most {most:,})")
        return count

    def string(self, what: str, most: int) -> str:
        length = self.number(_U64, what)
        if length > most:
            self.fail(f"the length of {what:.80} is {length:,}")
        start = self.take(length, what)
        try:
            return _text(self.content, start, self.at)
        except UnicodeDecodeError:
            self.fail(f"{what:.80} is no UTF-8")

    def number(self, form: struct.Struct, what: str) -> int:
        return int(form.unpack_from(self.content, self.take(form.size, what))[0])

    def take(self, size: int, what: str) -> int:
        start = self.at
        if size > self.size - start:
            self.fail(f"{what:.80} needs {size:,} bytes where {self.size - start:,} are left; it is truncated or lies")
        self.at += size
        return start

    def fail(self, what: str) -> NoReturn:
        raise CorruptDataError(f"{self.path}: damaged GGUF at byte {self.at:,}: {what}; {_REMEDY}")


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a GGUF file (version 3), whole or not at all; tensors are made and written one after another.

    Args:
        metadata: strings, booleans, integers (unsigned 32-bit if they fit, else 64-bit), floats (32-bit), lists of strings,
            numpy arrays and :class:`Strings` (stored in their own type).
        tensors: in the order of the file.
        show: told the bytes of tensors written so far, and of all.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string_bytes(key))
            _write_value(file, value)
        offset = 0
        for tensor in tensors:
            shape = tensor.shape[::-1]
            file.write(_string_bytes(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            file.write(struct.pack("<IQ", tensor.kind.code, offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            rows = np.ascontiguousarray(tensor.rows)
            assert rows.nbytes == tensor.nbytes, tensor.name
            file.write(rows.data)
            done += rows.nbytes
            show(done, total)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _string_bytes(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _write_value(file: BinaryIO, value: Any) -> None:
    if isinstance(value, str):
        file.write(_U32.pack(_STRING) + _string_bytes(value))
    elif isinstance(value, np.ndarray):
        file.write(struct.pack("<IIQ", _ARRAY, _CODE_OF_SCALAR[value.dtype], value.size) + value.tobytes())
    elif isinstance(value, Sequence):
        file.write(struct.pack("<IIQ", _ARRAY, _STRING, len(value)))
        file.write(b"".join(map(_string_bytes, value)))
    else:
        dtype = np.dtype(
            "|b1" if isinstance(value, bool) else "<f4" if isinstance(value, float) else _whole_type(value)
        )
        file.write(_U32.pack(_CODE_OF_SCALAR[dtype]) + np.array(value, dtype).tobytes())


def _whole_type(value: int) -> str:
    return "<u4" if 0 <= value < 1 << 32 else "<u8" if value >= 0 else "<i8"
