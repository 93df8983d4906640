"""Sequences on disk: an integer array that is memory-mapped, beside the hash of each of its rows.

``NAME.npy`` is a (rows, sequence length) array, ``NAME.leaves.npy`` the (rows, 32) sha256 leaves of a Merkle tree over
the rows. A row is checked against its leaf when it is read, the leaves against the manifest's root when they are first
touched: no batch is used that is not the batch that was prepared.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.errors import CorruptDataError
from mobillama.record.files import replaced_file
from mobillama.record.merkle import leaf_digest, merkle_root


def leaves_path(path: Path) -> Path:
    """Return where the leaves of a sequence file stand."""
    return path.with_name(path.name.removesuffix(".npy") + ".leaves.npy")


def write_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[bytes]) -> dict[str, Any]:
    """Write an ``.npy`` file block by block, whole or not at all; return its ``bytes`` and ``sha256``."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    digest, size = hashlib.sha256(header.getvalue()), len(header.getvalue())
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        file.write(header.getvalue())
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
        if size != len(header.getvalue()) + int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes were given, not {shape} of {dtype}")
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_sequences(
    path: Path, shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger], blocks: Iterable[NDArray[np.integer]]
) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Write consecutive blocks of rows as a sequence file with its leaves.

    Returns:
        The Merkle root (32 bytes), and ``bytes`` and ``sha256`` of the two files by name.
    """
    leaves: list[bytes] = []

    def hashed() -> Iterable[bytes]:
        for block in blocks:
            stored = np.ascontiguousarray(block, dtype=dtype)
            leaves.extend([leaf_digest(row.data) for row in stored])
            yield stored.tobytes()

    facts = {path.name: write_array(path, shape, dtype, hashed())}
    beside = leaves_path(path)
    facts[beside.name] = write_array(beside, (shape[0], 32), np.dtype("u1"), [b"".join(leaves)])
    return merkle_root(leaves), facts


class SequenceFile:
    """Rows of one sequence file, verified as they are read.

    Args:
        path: the ``.npy`` file.
        shape: (rows, sequence length) that its manifest states.
        dtype: the integers' type that its manifest states.
        root: the Merkle root that its manifest states.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger], root: bytes) -> None:
        self.path = path
        self.rows, self.length = shape
        self.dtype = dtype
        self.root = root

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """Return the given rows (n, sequence length) as they are stored.

        Raises:
            CorruptDataError: the file is missing, truncated, or a row differs from what was prepared.
        """
        out = np.asarray(self._mapped[rows])
        for row, ids, leaf in zip(rows.tolist(), out, np.asarray(self._leaves[rows]), strict=True):
            if leaf_digest(ids.data) != leaf.tobytes():
                raise CorruptDataError(
                    f"{self.path}: sequence {row} differs from what was prepared; prepare the data again"
                )
        return out

    @functools.cached_property
    def _mapped(self) -> NDArray[np.unsignedinteger]:
        return self._open(self.path, (self.rows, self.length), self.dtype)

    @functools.cached_property
    def _leaves(self) -> NDArray[np.uint8]:
        leaves = self._open(leaves_path(self.path), (self.rows, 32), np.dtype("u1"))
        if merkle_root([row.tobytes() for row in leaves]) != self.root:
            raise CorruptDataError(
                f"{leaves_path(self.path)}: differs from the root in the manifest; prepare the data again"
            )
        return leaves

    def _open(self, path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise CorruptDataError(f"{path}: missing; prepare the data again") from None
        except Exception as error:  # numpy lets through whatever parsing a changed header raises
            raise CorruptDataError(f"{path}: truncated or damaged ({error}); prepare the data again") from None
        if (array.shape, array.dtype, array.flags.c_contiguous) != (shape, dtype, True):
            raise CorruptDataError(
                f"{path}: holds {array.shape} of {array.dtype}, its manifest says {shape} of {dtype}; prepare the data again"
            )
        return array
