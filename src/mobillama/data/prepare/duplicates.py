"""Duplicates: equal texts by their hashes, near ones by datatrove's MinHash; of each cluster the first document is kept.

A document is known here by its number: its place among all documents of all tasks, in the order of the recipe. Because
tasks follow the input and clusters do not depend on the order of pairs, every machine keeps the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.text import TextNormConfig
from numpy.typing import NDArray

from mobillama.data.prepare.clean import SpacedWords
from mobillama.data.prepare.plan import ReadTask
from mobillama.data.prepare.read import load_records
from mobillama.data.prepare.stages import Execution, Progress, run_stage
from mobillama.recipe import PrepareRecipe
from mobillama.record.files import replaced_file

# 14 buckets of 8 hashes over 5-grams of words: FineWeb's setting; found with probability 0.92 at similarity 0.8.
# Accents are left as they are: folding them takes longer than all else together.
MINHASH = MinhashConfig(5, 14, 8, norm_config=TextNormConfig(norm_unicode_diacritics=False))

DROPPED = np.dtype([("document", "<i8"), ("of", "<i8"), ("exact", "?")])

_MERSENNE_PRIME = np.uint64((1 << 61) - 1)
_SHINGLES_AT_ONCE = 256  # times 112 hashes stays in the cache
_DOCUMENTS_PER_PARTITION = 16 << 20


class Signature(MinhashDedupSignature):
    """datatrove's signatures, equal to the bit, made of some shingles at a time.

    datatrove's own takes a kilobyte for each word of a document, gigabytes for a long one.
    """

    def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
        """Return the least of each hash over the shingles (n, 1), by bucket."""
        scale, shift = self.parameters
        least = np.full(scale.shape[-1], np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            hashes = shingles[start : start + _SHINGLES_AT_ONCE] * scale + shift
            # The remainder without a division, which would take most of the time: 2⁶¹ ≡ 1.
            above = hashes >> np.uint64(61)
            hashes &= _MERSENNE_PRIME
            hashes += above
            np.minimum(hashes, hashes - _MERSENNE_PRIME, out=hashes)
            np.minimum(least, hashes.min(axis=0), out=least)
        return [bucket.tolist() for bucket in np.split(least, self.config.num_buckets)]


def signature_step(work: Path) -> PipelineStep:
    """Return the step that writes the MinHash signatures of the documents a reading task hands on."""
    return Signature(str((work / "signatures").absolute()), MINHASH, language=SpacedWords())


def find_duplicates(
    work: Path,
    recipe: PrepareRecipe,
    tasks: list[ReadTask],
    documents: list[int],
    execution: Execution,
    progress: Progress,
) -> NDArray[np.void]:
    """Return the documents to drop (:data:`DROPPED`), sorted by number.

    Args:
        work: the preparation's working directory, in which all reading tasks are done.
        recipe: the preparation.
        tasks: the reading tasks.
        documents: number of documents of each task.
        execution: where to run.
        progress: told how far it is.
    """
    sources = list(recipe.sources.values())
    exact_tasks = [rank for rank, task in enumerate(tasks) if sources[task.source].clean.exact_duplicates]
    near_tasks = [rank for rank, task in enumerate(tasks) if sources[task.source].clean.near_duplicates]
    starts = np.cumsum([0, *documents])
    pairs = [np.empty((0, 2), np.int64)]
    exact = np.empty(0, np.int64)
    if exact_tasks:
        count = sum(documents[rank] for rank in exact_tasks)
        partitions = -(-count // _DOCUMENTS_PER_PARTITION)
        step = ExactPairs(work, exact_tasks, starts, partitions)
        run_stage(work, "find equal documents", [step], [1.0] * partitions, execution, progress)
        found = np.concatenate([np.load(step.path(rank)) for rank in range(partitions)])
        pairs.append(found)
        exact = np.unique(found[:, 1])
    if near_tasks:
        folder, out = str((work / "signatures").absolute()), work / "near"
        buckets = MinhashDedupBuckets(folder, str(out.absolute()), config=MINHASH, lines_to_buffer=4096)
        run_stage(work, "find near duplicates", [buckets], [1.0] * MINHASH.num_buckets, execution, progress)
        pairs += [_numbered(path, work, starts) for path in sorted(out.glob("*.dups"))]
    return _clusters(np.concatenate(pairs), exact)


class ExactPairs(PipelineStep):
    """Finds documents with equal cleaned texts among those whose hash falls into a task's partition."""

    name = "find equal documents"
    type = "MobiLlama"

    def __init__(self, work: Path, tasks: list[int], starts: NDArray[np.int64], partitions: int) -> None:
        super().__init__()
        self.work, self.tasks, self.starts, self.partitions = str(work), tasks, starts, partitions

    def path(self, rank: int) -> Path:
        """Return where a partition's pairs stand: (n, 2) numbers, the first document of a text and another one."""
        return Path(self.work) / "equal" / f"{rank:05d}.npy"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do partition ``rank``."""
        digests, numbers = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        for task in self.tasks:
            records = load_records(Path(self.work), task)
            halves = np.ascontiguousarray(records["cleaned"]).view("<u8").reshape(-1, 2)
            chosen = np.flatnonzero((records["verdict"] == 0) & (halves[:, 0] % np.uint64(self.partitions) == rank))
            digests.append(halves[chosen])
            numbers.append(self.starts[task] + chosen)
        digest, number = np.concatenate(digests), np.concatenate(numbers)
        order = np.lexsort((number, digest[:, 1], digest[:, 0]))
        digest, number = digest[order], number[order]
        first = np.ones(len(number), bool)
        first[1:] = (digest[1:] != digest[:-1]).any(axis=1)
        keeper = number[np.maximum.accumulate(np.where(first, np.arange(len(number)), 0))] if len(number) else number
        self.path(rank).parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(self.path(rank)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.stack([keeper, number], axis=1)[~first])
        yield from ()


def _numbered(path: Path, work: Path, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return datatrove's pairs (task, place among its kept documents, and again) as pairs of numbers."""
    rows = np.fromfile(path, "<u4").reshape(-1, 4)
    out = np.empty((len(rows), 2), np.int64)
    for column in (0, 1):
        for task in np.unique(rows[:, 2 * column]):
            chosen = rows[:, 2 * column] == task
            kept = np.flatnonzero(load_records(work, int(task))["verdict"] == 0)
            out[chosen, column] = starts[task] + kept[rows[chosen, 2 * column + 1]]
    return out


def _clusters(pairs: NDArray[np.int64], exact: NDArray[np.int64]) -> NDArray[np.void]:
    """Return every document that hangs together by pairs with an earlier one, and the first document of its cluster."""
    nodes, flat = np.unique(pairs, return_inverse=True)
    edges = flat.reshape(-1, 2)
    label = np.arange(len(nodes))
    while True:
        lowest = np.minimum(label[edges[:, 0]], label[edges[:, 1]])
        following = label.copy()
        for column in (0, 1):
            np.minimum.at(following, edges[:, column], lowest)
            np.minimum.at(following, label[edges[:, column]], lowest)
        following = following[following]
        if np.array_equal(following, label):
            break
        label = following
    dropped = np.flatnonzero(label != np.arange(len(nodes)))
    out = np.empty(len(dropped), DROPPED)
    out["document"], out["of"] = nodes[dropped], nodes[label[dropped]]
    out["exact"] = np.isin(out["document"], exact)
    return out
