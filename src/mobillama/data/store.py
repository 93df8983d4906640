"""Sequences on disk: an integer array that is memory-mapped, beside the hash of each of its rows.

``NAME.npy`` is a (rows, sequence length) array, ``NAME.leaves.npy`` the (rows, 32) sha256 leaves of a Merkle tree over
the rows. A row is checked against its leaf when it is read, the leaves against the manifest's root when they are first
touched: no batch is used that is not the batch that was prepared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.merkle import leaf_digest, merkle_root


def id_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest stored integer type that holds every id of a vocabulary.

    Raises:
        UsageError: the vocabulary is beyond 32 bits.
    """
    for bits, name in ((16, "<u2"), (32, "<u4")):
        if vocab_size <= 1 << bits:
            return np.dtype(name)
    raise UsageError(f"vocab_size: {vocab_size} ids do not fit the 32-bit integers of a chunk")


def leaves_path(path: Path) -> Path:
    """Return where the leaves of a sequence file stand."""
    return path.with_name(path.name.removesuffix(".npy") + ".leaves.npy")


def write_sequences(
    path: Path, shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger], blocks: Iterable[NDArray[np.integer]]
) -> bytes:
    """Write consecutive blocks of rows as a sequence file with its leaves; return the Merkle root (32 bytes)."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    leaves: list[bytes] = []
    for block in blocks:
        stored = np.ascontiguousarray(block, dtype=dtype)
        rows[len(leaves) : len(leaves) + len(stored)] = stored
        leaves += [leaf_digest(row.tobytes()) for row in stored]
    if len(leaves) != shape[0]:
        raise ValueError(f"{path}: {len(leaves)} rows were given, {shape[0]} announced")
    rows.flush()
    np.save(leaves_path(path), np.frombuffer(b"".join(leaves), dtype=np.uint8).reshape(shape[0], 32))
    return merkle_root(leaves)


class SequenceFile:
    """Rows of one sequence file, verified as they are read.

    Args:
        path: the ``.npy`` file.
        rows: number of rows that its manifest states.
        root: the Merkle root that its manifest states.
    """

    def __init__(self, path: Path, rows: int, root: bytes) -> None:
        self.path = path
        self.rows = rows
        self.root = root

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the given rows (n, sequence length) as int64.

        Raises:
            CorruptDataError: the file is missing, truncated, or a row differs from what was prepared.
        """
        out = self._mapped[rows]
        for row, ids in zip(rows.tolist(), out, strict=True):
            if leaf_digest(ids.tobytes()) != self._leaves[row].tobytes():
                raise CorruptDataError(
                    f"{self.path}: sequence {row} differs from what was prepared; prepare the data again"
                )
        return out.astype(np.int64)

    @functools.cached_property
    def _mapped(self) -> NDArray[np.unsignedinteger]:
        return self._open(self.path)

    @functools.cached_property
    def _leaves(self) -> NDArray[np.uint8]:
        leaves = self._open(leaves_path(self.path))
        if merkle_root([row.tobytes() for row in leaves]) != self.root:
            raise CorruptDataError(
                f"{leaves_path(self.path)}: differs from the root in the manifest; prepare the data again"
            )
        return leaves

    def _open(self, path: Path) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise CorruptDataError(f"{path}: missing; prepare the data again") from None
        except (ValueError, OSError, EOFError) as error:
            raise CorruptDataError(f"{path}: truncated or damaged ({error}); prepare the data again") from None
        if array.shape[0] != self.rows:
            raise CorruptDataError(
                f"{path}: {array.shape[0]} rows, its manifest says {self.rows}; prepare the data again"
            )
        return array
