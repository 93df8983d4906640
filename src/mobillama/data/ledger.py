"""The ledger: one row for every raw document, kept or not, in the order of the recipe.

``documents/SOURCE.npy`` holds the rows of a source; ``documents/duplicates.npy`` tells of which document a dropped
duplicate is a duplicate. A verdict is an index into the manifest's ``verdicts``; 0 is kept.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobillama.record.manifest import verify_manifest

# Where the document's ids end in its source's stream (for one not kept: where they would stand); its file (index into
# the manifest) and line; the first half of the sha256 of its raw bytes; its verdict.
DOCUMENT = np.dtype([("end", "<u8"), ("file", "<u4"), ("line", "<u4"), ("digest", "u1", (16,)), ("verdict", "u1")])

# A dropped duplicate, and the document that was kept instead.
DUPLICATE = np.dtype([("source", "u1"), ("document", "<u8"), ("of_source", "u1"), ("of_document", "<u8")])

KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE = "kept", "exact_duplicate", "near_duplicate"


@dataclass(frozen=True)
class Entry:
    """A row of the ledger for people."""

    source: str
    document: int
    file: str
    line: int
    digest: str
    tokens: int
    verdict: str
    duplicate_of: tuple[str, int] | None = None


class Ledger:
    """The ledger of a prepared data set.

    Args:
        path: the data directory.
        manifest: its manifest.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path, self._manifest = path, manifest
        self.source_names: list[str] = [source["name"] for source in manifest["sources"]]
        self._files = [[file["name"] for file in source["files"]] for source in manifest["inputs"]["sources"]]

    @functools.cache  # noqa: B019 a ledger lives as long as its process
    def table(self, source: int) -> NDArray[np.void]:
        """Return a source's rows, memory-mapped, after checking their file.

        Raises:
            CorruptDataError: the file differs from the manifest.
        """
        return self._load(f"documents/{self.source_names[source]}.npy")

    def at(self, source: int, token: int) -> int:
        """Return the kept document whose ids hold position ``token`` of the source's stream."""
        return first_beyond(self.table(source), token)

    def start(self, source: int, document: int) -> int:
        """Return where a document's ids begin in its source's stream."""
        return int(self.table(source)["end"][document - 1]) if document else 0

    def entry(self, source: int, document: int) -> Entry:
        """Return a document's row."""
        row = self.table(source)[document]
        verdict = self._manifest["verdicts"][int(row["verdict"])]
        of = None
        if verdict in (EXACT_DUPLICATE, NEAR_DUPLICATE):
            kept = self._duplicates[self._duplicate_index[source, document]]
            of = (self.source_names[int(kept["of_source"])], int(kept["of_document"]))
        return Entry(
            source=self.source_names[source],
            document=document,
            file=self._files[source][int(row["file"])],
            line=int(row["line"]),
            digest=row["digest"].tobytes().hex(),
            tokens=int(row["end"]) - self.start(source, document),
            verdict=verdict,
            duplicate_of=of,
        )

    def entries(self) -> Iterator[Entry]:
        """Yield the rows of all sources, in order."""
        for source in range(len(self.source_names)):
            for document in range(len(self.table(source))):
                yield self.entry(source, document)

    @functools.cached_property
    def _duplicates(self) -> NDArray[np.void]:
        return self._load("documents/duplicates.npy")

    @functools.cached_property
    def _duplicate_index(self) -> dict[tuple[int, int], int]:
        pairs = zip(self._duplicates["source"].tolist(), self._duplicates["document"].tolist(), strict=True)
        return {pair: number for number, pair in enumerate(pairs)}

    def _load(self, name: str) -> NDArray[np.void]:
        verify_manifest(self._path, self._manifest, name)
        table: NDArray[np.void] = np.load(self._path / name, mmap_mode="r", allow_pickle=False)
        return table


def first_beyond(table: NDArray[np.void], token: int) -> int:
    """Return the first row whose ``end`` is above ``token``, touching only a few rows of a mapped table."""
    return bisect.bisect_right(table["end"], token)
