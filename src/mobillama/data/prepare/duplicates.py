"""Duplicates: equal texts by their hashes, near ones by datatrove's MinHash; of each cluster the first document is kept.

A document is known here by its number: its place among all documents of all tasks, in the order of the recipe. Because
tasks follow the input and clusters do not depend on the order of pairs, every machine keeps the same documents.
"""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
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
_SAMPLED = 1000  # one of so many signatures tells where ranges end
SIGNATURE = np.dtype([("hashes", "<u8", (MINHASH.hashes_per_bucket,)), ("document", "<u4")])  # datatrove's


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
    for chosen, kind in ((exact_tasks, ExactPairs), (near_tasks, NearPairs)):
        if not chosen:
            continue
        step = kind(work, chosen, starts, sum(documents[rank] for rank in chosen))
        run_stage(work, step.name, [step], [1.0] * step.size, execution, progress)
        pairs += [np.load(step.path(rank)) for rank in range(step.size)]
        if kind is ExactPairs:
            exact = np.unique(np.concatenate(pairs)[:, 1])
    return _clusters(np.concatenate(pairs), exact)


class _Pairs(PipelineStep):
    """Finds equal keys in one partition of them, and leaves pairs: the first document that has a key, and another one.

    Every partition is read from all tasks one after another, so that neither memory nor open files grow with the input.
    """

    type = "MobiLlama"
    per_partition: int  # documents

    def __init__(self, work: Path, tasks: list[int], starts: NDArray[np.int64], count: int) -> None:
        super().__init__()
        self.work, self.tasks, self.starts = work, tasks, starts
        self.partitions = self.size = -(-count // self.per_partition)  # size: number of the stage's tasks

    def path(self, rank: int) -> Path:
        """Return where a task's pairs stand: (n, 2) numbers of documents."""
        return self.work / self.name / f"{rank:05d}.npy"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do task ``rank``."""
        found = [self.keys(rank, task) for task in self.tasks]
        pairs = self.numbered(_equal(*map(np.concatenate, zip(*found, strict=True))))
        self.path(rank).parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(self.path(rank)) as temporary, open(temporary, "wb") as file:
            np.save(file, pairs)
        yield from ()

    @abstractmethod
    def keys(self, rank: int, task: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return what a reading task has for task ``rank``: keys (n, columns), and names of documents (n,)."""

    def numbered(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return pairs of names as pairs of documents' numbers."""
        return pairs


class ExactPairs(_Pairs):
    """Documents with equal cleaned texts, by their hashes."""

    name = "find equal documents"
    per_partition = 16 << 20

    def keys(self, rank: int, task: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the hashes of kept documents that fall into the partition."""
        records = load_records(self.work, task)
        halves = np.ascontiguousarray(records["cleaned"]).view("<u8").reshape(-1, 2)
        chosen = np.flatnonzero((records["verdict"] == 0) & (halves[:, 0] % np.uint64(self.partitions) == rank))
        return halves[chosen], self.starts[task] + chosen


class NearPairs(_Pairs):
    """Documents whose MinHash signatures are equal in a bucket: what datatrove's MinhashDedupBuckets finds.

    datatrove merges the files of all tasks at once, a signature at a time. Here a bucket falls into ranges of its first
    hash, and a range of each file, which is sorted, is read in one piece.
    """

    name = "find near duplicates"
    per_partition = 4 << 20

    def __init__(self, work: Path, tasks: list[int], starts: NDArray[np.int64], count: int) -> None:
        super().__init__(work, tasks, starts, count)
        self.size *= MINHASH.num_buckets
        self._bounds = [self._ranges(bucket) for bucket in range(MINHASH.num_buckets)]

    def keys(self, rank: int, task: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the signatures whose first hash lies in the range of task ``rank``, named by task and place in it."""
        bucket, part = divmod(rank, self.partitions)
        signatures = self._signatures(bucket, task)
        start, end = (
            bisect.bisect_left(signatures, bound, key=lambda row: int(row["hashes"][0]))
            for bound in self._bounds[bucket][part : part + 2]
        )
        chosen = np.array(signatures[start:end])
        return chosen["hashes"], task << 32 | chosen["document"].astype(np.int64)

    def numbered(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return documents' numbers: signatures count only those that no rule has dropped."""
        out, of_task = np.empty_like(pairs), pairs >> 32
        for task in np.unique(of_task):
            kept = np.flatnonzero(load_records(self.work, int(task))["verdict"] == 0)
            out[of_task == task] = self.starts[task] + kept[pairs[of_task == task] & 0xFFFFFFFF]
        return out

    def _ranges(self, bucket: int) -> list[int]:
        """Return the borders of ranges that hold about as many of a bucket's signatures, by a sample of them."""
        inner: list[int] = []
        if self.partitions > 1:
            seen = [np.zeros(1, np.uint64)]
            for task in self.tasks:
                hashes = self._signatures(bucket, task)["hashes"][:, 0]
                seen.append(np.array(hashes[min(len(hashes), _SAMPLED) // 2 :: _SAMPLED]))
            shares = np.arange(1, self.partitions) / self.partitions
            inner = np.quantile(np.concatenate(seen), shares, method="nearest").astype(int).tolist()
        return [0, *inner, int(_MERSENNE_PRIME)]

    def _signatures(self, bucket: int, task: int) -> NDArray[np.void]:
        path = self.work / "signatures" / f"bucket_{bucket:03d}" / f"{task:05d}.minhash.sig"
        return np.memmap(path, SIGNATURE, "r") if path.stat().st_size else np.empty(0, SIGNATURE)


def _equal(keys: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (first, other) numbers of all rows of ``keys`` (n, columns) that are equal to a row of a lower number."""
    order = np.argsort(keys[:, 0])
    again, likely = keys[order[1:], 0] == keys[order[:-1], 0], np.zeros(len(keys), bool)
    likely[1:] |= again
    likely[:-1] |= again
    order = order[likely]  # few, to be compared in full
    order = order[np.lexsort((numbers[order], *keys[order].T))]
    keys, numbers = keys[order], numbers[order]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    keeper = numbers[np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))]
    return np.stack([keeper, numbers], axis=1)[~first]


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
