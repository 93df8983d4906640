"""Files of lines, compressed or not, read with bounded memory; an archive with a fault anywhere is an error.

The readers of the standard library and of zstandard take what follows a first whole stream, or a missing end, for
nothing: a damaged second half would be lost without a word.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMPRESSED = (".gz", ".xz", ".zst")
BLOCK_BYTES = 1 << 20


class ArchiveError(Exception):
    """An archive is damaged or ends too early."""


ARCHIVE_ERRORS = (ArchiveError, EOFError, gzip.BadGzipFile, zlib.error)


def open_lines(path: Path) -> Any:
    """Open a file of lines as binary lines; what is wrong with an archive raises one of :data:`ARCHIVE_ERRORS`."""
    if path.suffix in COMPRESSED and not path.stat().st_size:
        raise ArchiveError("an archive of 0 bytes")
    if path.suffix == ".xz":
        return io.BufferedReader(_Streams(path, lzma.LZMADecompressor, lzma.LZMAError, padding=b"\0"), BLOCK_BYTES)
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import zstandard

        new = zstandard.ZstdDecompressor().decompressobj
        return io.BufferedReader(_Streams(path, new, zstandard.ZstdError), BLOCK_BYTES)
    return open(path, "rb", buffering=BLOCK_BYTES)


class _Streams(io.RawIOBase):
    """Bytes of a file of compressed streams, one after another.

    Args:
        path: the file.
        new: makes a decompressor of one stream, with ``decompress``, ``eof`` and ``unused_data``.
        error: what it raises.
        padding: the byte that may stand between streams.
    """

    def __init__(self, path: Path, new: Callable[[], Any], error: type[Exception], padding: bytes = b"") -> None:
        self._new, self._error, self._padding = new, error, padding
        self._file = open(path, "rb")  # noqa: SIM115 closed in close()
        self._stream: Any = None
        self._given = b""  # decompressed, not yet read
        self._unread = b""  # compressed, of the next stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._given:
            block = self._unread or self._file.read(1 << 16)
            self._unread = b""
            if not block:
                if self._stream is not None:
                    raise ArchiveError("the file ends before its last stream")
                return 0
            if self._stream is None:
                block = block.lstrip(self._padding) if self._padding else block
                if not block:
                    continue
                self._stream = self._new()
            try:
                self._given = self._stream.decompress(block)
            except self._error as error:
                raise ArchiveError(str(error)) from None
            if self._stream.eof:
                self._unread, self._stream = self._stream.unused_data, None
        count = min(len(buffer), len(self._given))
        buffer[:count] = self._given[:count]
        self._given = self._given[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
