"""Preparation from end to end: raw documents → cleaned → ids → sequences cut across document borders → ordered chunks.

The pipeline of LLM360's Amber (section 3.3 of the paper): no begin mark, an end mark after every document, each source
packed on its own, the remainder of a source dropped (and counted). It works in ``OUT.partial`` beside its output; killed
at any moment, the same command goes on from the last finished task.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from mobillama.data.dataset import FORMAT, PREPARATION_NAME
from mobillama.data.layout import Layout, SourceCount
from mobillama.data.ledger import DOCUMENT, DUPLICATE, EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE
from mobillama.data.prepare.duplicates import DROPPED, find_duplicates, signature_step
from mobillama.data.prepare.pack import (
    SORT_STAGE,
    WRITE_STAGE,
    SortRun,
    Stream,
    WriteTarget,
    plan_runs,
    plan_targets,
    run_path,
    target_facts,
)
from mobillama.data.prepare.plan import (
    Input,
    ReadTask,
    check_unchanged,
    describe_inputs,
    find_inputs,
    pin_revisions,
    read_tasks,
    readings,
)
from mobillama.data.prepare.read import STAGE as READ_STAGE
from mobillama.data.prepare.read import Read, first_lines, ids_path, load_facts, load_records
from mobillama.data.prepare.stages import Execution, Progress, run_stage
from mobillama.data.store import write_array
from mobillama.data.tokenizer import Tokenizer, id_type, load_tokenizer, save_tokenizer
from mobillama.errors import MobiLlamaError, UsageError
from mobillama.recipe import PrepareRecipe
from mobillama.record.environment import environment
from mobillama.record.files import fsync_directory, fsync_tree, read_json, write_json
from mobillama.record.lock import locked
from mobillama.record.manifest import MANIFEST_NAME, read_manifest, write_manifest
from mobillama.record.merkle import merkle_root

STARTED_NAME = "started"  # marks a working directory as ours, and when its first attempt began
_ROWS_AT_ONCE = 1 << 20
_CHEAP_SECONDS = 60


def no_progress(stage: str, done: float, total: float) -> None:
    """Report progress to nobody."""


def prepare(
    recipe: PrepareRecipe, out: Path, progress: Progress = no_progress, execution: Execution | None = None
) -> dict[str, Any]:
    """Prepare a data set in ``out`` and return its manifest; an equal one that is already there is kept.

    Args:
        recipe: what to prepare.
        out: the data directory to make; ``OUT.partial`` is used on the way.
        progress: told (stage, done, total) as it goes.
        execution: where the tasks run; the outcome does not depend on it.

    Raises:
        UsageError: a source is missing, empty or shorter than one sequence; ``out`` holds something else or cannot be
            written; ``OUT.partial`` holds work on other inputs.
        CorruptDataError: a document cannot be read.
    """
    execution = execution or Execution(workers=1)
    tokenizer = load_tokenizer(Path(recipe.tokenizer))
    recipe = pin_revisions(recipe)
    files = find_inputs(recipe)
    work = out.with_name(f"{out.name}.partial")
    try:
        if out.exists() and not (out / MANIFEST_NAME).is_file():
            raise UsageError(f"{out}: exists and is no prepared data; choose another --out")
        _check_own(work)
        if out.exists():
            inputs = describe_inputs(recipe, tokenizer, files, None, execution.local_workers, progress)
            manifest = _existing(out, inputs)
            _remove(work)
            return manifest
        work.mkdir(parents=True, exist_ok=True)
        if not (work / STARTED_NAME).exists():
            (work / STARTED_NAME).touch()
        with locked(work, "a preparation"):
            try:
                return _Preparation(recipe, out, work, tokenizer, files, execution, progress).run()
            except MobiLlamaError:
                if _is_cheap(work):
                    _remove(work)
                raise
    except OSError as error:
        where = error.filename or out
        raise UsageError(
            f"{where}: {error.strerror}; free space or choose another place, then run this again"
        ) from None


def _check_own(work: Path) -> None:
    """Refuse a directory of somebody else's that has the name of the working directory."""
    if work.exists() and not (work / STARTED_NAME).exists() and (not work.is_dir() or any(work.iterdir())):
        raise UsageError(f"{work}: is needed to work in, but holds something else; move it or choose another --out")


def _remove(work: Path) -> None:
    """Remove a working directory so that a kill at any moment leaves it ours, and its stages never without their inputs."""
    if work.exists():
        _remove_stages(work)
        for name in ("inputs.json", "hashes.json", STARTED_NAME):
            (work / name).unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)


def _remove_stages(work: Path) -> None:
    """Remove what the stages left, their marks first, so that nothing half removed counts as done."""
    for path in [work / "stages", *(path for path in work.iterdir() if path.is_dir())]:
        if path.exists():
            shutil.rmtree(path)
    (work / "dropped.npy").unlink(missing_ok=True)


def _is_cheap(work: Path) -> bool:
    """Tell whether an unfinished preparation took so little time that nobody misses it."""
    done = [path.stat().st_mtime for path in (*work.glob("stages/*/completions/*"), *work.glob("hashes.json"))]
    return not done or max(done) - (work / STARTED_NAME).stat().st_mtime < _CHEAP_SECONDS


def _existing(out: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(out, FORMAT)
    different = _difference(manifest["inputs"], inputs)
    if different:
        raise UsageError(f"{out}: was prepared with another '{different}'; choose another --out or remove it")
    return manifest


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the first setting or source file in which two descriptions of inputs differ, or return ``""``."""
    for key, value in now.items():
        if key == "sources" or before.get(key) == value:
            continue
        return key
    old = {source["name"]: source for source in before["sources"]}
    if list(old) != [source["name"] for source in now["sources"]]:
        return "sources"
    for source in now["sources"]:
        for key, value in source.items():
            known = old[source["name"]].get(key)
            if known == value:
                continue
            if key == "files":
                changed = next((file["name"] for file in value if file not in known), "files")
                return f"sources.{source['name']}' text in '{changed}"
            return f"sources.{source['name']}.{key}"
    return ""


def _of_reading(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a description of inputs that decides what the reading stage makes."""
    keys = {"holdout", "chunks", "seed"}
    sources = [
        {key: value for key, value in source.items() if key not in ("weight", "licence", "url")}
        for source in inputs["sources"]
    ]
    if all(source["format"] != "amber" for source in sources):
        keys.add("sequence_length")
    return {key: value for key, value in inputs.items() if key not in keys} | {"sources": sources}


class _Preparation:
    """One preparation: the stages in order, and what each hands to the next."""

    def __init__(
        self,
        recipe: PrepareRecipe,
        out: Path,
        work: Path,
        tokenizer: Tokenizer,
        files: list[list[Input]],
        execution: Execution,
        progress: Progress,
    ) -> None:
        self.recipe, self.out, self.work, self.tokenizer = recipe, out, work, tokenizer
        self.files, self.execution, self.progress = files, execution, progress
        self.names = list(recipe.sources)
        self.dtype = id_type(tokenizer.vocab_size)
        self.result = work / "result"
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Run every stage that is not done, and put the result in its place."""
        inputs = self._begin()
        tasks = read_tasks(self.recipe, self.files)
        self._read(tasks)
        check_unchanged(self.recipe, self.tokenizer, self.files, inputs)
        facts = load_facts(self.work, len(tasks))
        dropped = self._timed("find duplicates", lambda: self._find_duplicates(tasks, facts))
        sources, verdicts, corpus_root = self._timed("ledger", lambda: self._write_ledger(tasks, facts, dropped))
        counts = [SourceCount(s["name"], s["sequences"], s["holdout_sequences"], s["dealt_sequences"]) for s in sources]
        layout = Layout(corpus_root, self.recipe.seed, counts)
        written = self._pack(layout, tasks, [fact["documents"] for fact in facts])
        return self._finish(inputs, sources, verdicts, corpus_root, layout, written)

    def _begin(self) -> dict[str, Any]:
        inputs = describe_inputs(
            self.recipe,
            self.tokenizer,
            self.files,
            self.work / "hashes.json",
            self.execution.local_workers,
            self.progress,
        )
        planned = self.work / "inputs.json"
        if planned.is_file():
            self._take_over(read_json(planned), inputs)
        else:
            _remove_stages(self.work)  # nothing says what they were made from
        for name in ("read", "documents", "runs", "targets", "result/documents", "result/train", "result/holdout"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        write_json(planned, inputs)
        return inputs

    def _take_over(self, before: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Keep what an earlier attempt left as far as it is of use: all of it, what was read, or nothing."""
        different = _difference(before, inputs)
        if not different:
            return
        read_otherwise = _difference(_of_reading(before), _of_reading(inputs))
        if not read_otherwise and not (self.work / "stages" / SORT_STAGE / "done").exists():
            for name in (f"stages/{SORT_STAGE}", "runs", "result"):
                if (self.work / name).exists():
                    shutil.rmtree(self.work / name)
        elif _is_cheap(self.work):
            _remove_stages(self.work)
        else:
            raise UsageError(
                f"{self.work}: holds an unfinished preparation with another '{read_otherwise or different}'; "
                "remove it to start anew, or choose another --out"
            )

    def _timed(self, name: str, action: Any) -> Any:
        started = time.perf_counter()
        result = action()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    def _stage(self, name: str, steps: list[PipelineStep], sizes: list[float]) -> None:
        self._timed(name, lambda: run_stage(self.work, name, steps, sizes, self.execution, self.progress))

    def _read(self, tasks: list[ReadTask]) -> None:
        steps: list[PipelineStep] = [
            Read(self.work.absolute(), self.recipe, tasks, readings(self.recipe, self.tokenizer.vocab_size))
        ]
        if any(source.clean.near_duplicates for source in self.recipe.sources.values()):
            steps.append(signature_step(self.work))
        self._stage(READ_STAGE, steps, [max(task.bytes, 1) for task in tasks])

    def _find_duplicates(self, tasks: list[ReadTask], facts: list[dict[str, Any]]) -> NDArray[np.void]:
        path = self.work / "dropped.npy"
        if not path.exists():
            documents = [fact["documents"] for fact in facts]
            found = find_duplicates(self.work.absolute(), self.recipe, tasks, documents, self.execution, self.progress)
            write_array(path, found.shape, DROPPED, [found.tobytes()])
        return np.load(path, allow_pickle=False)

    def _write_ledger(
        self, tasks: list[ReadTask], facts: list[dict[str, Any]], dropped: NDArray[np.void]
    ) -> tuple[list[dict[str, Any]], list[str], bytes]:
        """Write the documents' tables; return the sources' counts, the verdicts, and the root over the tables."""
        found = {verdict for fact in facts for verdict in fact["verdicts"]} - {KEPT}
        verdicts = [KEPT, *sorted(found | {EXACT_DUPLICATE, NEAR_DUPLICATE})]
        if len(verdicts) > 256:
            raise RuntimeError(f"{len(verdicts)} verdicts do not fit a byte")
        starts = np.cumsum([0] + [fact["documents"] for fact in facts])
        before = first_lines(tasks, facts)
        sources, digests = [], []
        for index, name in enumerate(self.names):
            mine = [rank for rank, task in enumerate(tasks) if task.source == index]
            documents = sum(facts[rank]["documents"] for rank in mine)
            if not documents:
                raise UsageError(f"sources.{name}: holds no document; remove the source or mend its path")
            counts: Counter[int] = Counter()
            tokens = [0]
            blocks = _ledger_blocks(self.work, mine, starts, facts, before, dropped, verdicts, counts, tokens)
            digests.append(
                write_array(self.work / "documents" / f"{name}.npy", (documents,), DOCUMENT, blocks)["sha256"]
            )
            reasons = {verdicts[code]: counts[code] for code in sorted(counts) if code}
            if not counts[0]:
                said = ", ".join(f"{rule} {count}" for rule, count in reasons.items())
                raise UsageError(f"sources.{name}: none of its {documents} documents is kept ({said}); mend its clean")
            fact = {
                "name": name,
                "documents": documents,
                "kept_documents": counts[0],
                "bytes": sum(facts[rank]["bytes"] for rank in mine),
                "tokens": tokens[0],
                "verdicts": reasons,
            }
            sources.append(self._count(fact))
        self._write_duplicates(tasks, starts, dropped)
        return sources, verdicts, merkle_root([bytes.fromhex(digest) for digest in digests])

    def _write_duplicates(self, tasks: list[ReadTask], starts: NDArray[np.int64], dropped: NDArray[np.void]) -> None:
        source_of_task = np.array([task.source for task in tasks])
        first_of_source = np.array([starts[np.argmax(source_of_task == s)] for s in range(len(self.names))])
        table = np.empty(len(dropped), DUPLICATE)
        for prefix, column in (("", "document"), ("of_", "of")):
            source = source_of_task[np.searchsorted(starts, dropped[column], side="right") - 1]
            table[f"{prefix}source"] = source
            table[f"{prefix}document"] = dropped[column] - first_of_source[source]
        write_array(self.work / "documents" / "duplicates.npy", table.shape, DUPLICATE, [table.tobytes()])

    def _count(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Add to a source's counts its sequences, how many are held out, and how many rows the others are dealt to."""
        recipe, name = self.recipe, facts["name"]
        sequences, left = divmod(facts["tokens"], recipe.sequence_length)
        held = recipe.holdout * sequences if recipe.holdout < 1 else recipe.holdout
        holdout = min(sequences, max(1, round(held))) if recipe.holdout else 0
        dealt = round(recipe.sources[name].weight * (sequences - holdout))
        if dealt < 1:
            raise UsageError(
                f"sources.{name}: {facts['tokens']} tokens give {sequences} sequences of {recipe.sequence_length}, of "
                f"which {holdout} are to be held out; nothing is left to train on: use more text, a shorter "
                "sequence_length, a smaller holdout or a greater weight"
            )
        counted = {"sequences": sequences, "holdout_sequences": holdout, "dealt_sequences": dealt}
        return {**facts, **counted, "dropped_tokens": left}

    def _pack(self, layout: Layout, tasks: list[ReadTask], documents: list[int]) -> list[dict[str, Any]]:
        if layout.train_size < self.recipe.chunks:
            raise UsageError(
                f"chunks: {self.recipe.chunks} chunks cannot be filled from {layout.train_size} training sequences; "
                f"use at most {layout.train_size}, or more text"
            )
        length, dtype = self.recipe.sequence_length, self.dtype.str
        streams = []
        for index, name in enumerate(self.names):
            mine = [rank for rank, task in enumerate(tasks) if task.source == index]
            firsts = np.cumsum([0] + [documents[rank] for rank in mine]).tolist()
            streams.append(Stream(name, tuple(mine), tuple(firsts[:-1])))
        runs = plan_runs(layout, length * self.dtype.itemsize)
        targets = plan_targets(layout, self.recipe.chunks)
        work = self.work.absolute()
        sort = SortRun(work, layout, streams, runs, dtype, length)
        self._stage(SORT_STAGE, [sort], [run.end - run.start for run in runs])
        for rank in range(len(tasks)):
            ids_path(work, rank).unlink(missing_ok=True)
        write = WriteTarget(work, self.result.absolute(), targets, len(runs), dtype, length)
        self._stage(WRITE_STAGE, [write], [max(target.end - target.start, 1) for target in targets])
        for rank in range(len(runs)):
            run_path(work, rank, "ids").unlink(missing_ok=True)
        return [read_json(target_facts(work, rank)) for rank in range(len(targets))]

    def _finish(
        self,
        inputs: dict[str, Any],
        sources: list[dict[str, Any]],
        verdicts: list[str],
        corpus_root: bytes,
        layout: Layout,
        written: list[dict[str, Any]],
    ) -> dict[str, Any]:
        # What a killed attempt left is no part of the data.
        for leftover in (*self.work.glob("documents/.*.tmp"), *self.result.rglob(".*.tmp")):
            leftover.unlink()
        (self.result / PREPARATION_NAME).unlink(missing_ok=True)
        for table in (self.work / "documents").iterdir():
            os.replace(table, self.result / "documents" / table.name)
        save_tokenizer(self.tokenizer, self.result / "tokenizer")
        known = {name: fact for target in written for name, fact in target.pop("files").items()}
        chunks, holdout = written[: self.recipe.chunks], written[self.recipe.chunks :]
        manifest = write_manifest(
            self.result,
            {
                "format": FORMAT,
                "inputs": inputs,
                "dtype": self.dtype.str,
                "sources": sources,
                "verdicts": verdicts,
                "train_sequences": layout.train_size,
                "corpus_root": corpus_root.hex(),
                "root": merkle_root([bytes.fromhex(chunk["root"]) for chunk in chunks]).hex(),
                "chunks": chunks,
                "holdout": [{**fact, "source": name} for fact, name in zip(holdout, self.names, strict=True)],
            },
            known,
        )
        write_json(
            self.result / PREPARATION_NAME,
            {
                "note": "How and where this was made; nothing here changes what was made.",
                "environment": environment(),
                "executor": self.execution.executor,
                "workers": self.execution.workers or os.cpu_count(),
                "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
                "tokenizer": str(Path(self.recipe.tokenizer).absolute()),
                "paths": {name: str(source.path) for name, source in self.recipe.sources.items()},
            },
        )
        fsync_tree(self.result)
        os.rename(self.result, self.out)
        fsync_directory(self.out.absolute().parent)
        _remove(self.work)
        return manifest


def _ledger_blocks(
    work: Path,
    mine: list[int],
    starts: NDArray[np.int64],
    facts: list[dict[str, Any]],
    before: list[dict[int, int]],
    dropped: NDArray[np.void],
    verdicts: list[str],
    counts: Counter[int],
    tokens: list[int],
) -> Iterator[bytes]:
    """Yield the rows of a source's table, block by block; add up verdicts in ``counts`` and kept tokens in ``tokens``."""
    for rank in mine:
        records = load_records(work, rank)
        codes = np.array([verdicts.index(verdict) for verdict in facts[rank]["verdicts"]], np.uint8)
        most = max(before[rank], default=0)
        lines = np.array([before[rank].get(file, 0) for file in range(most + 1)], np.int64)
        last_end = 0
        for first in range(0, len(records), _ROWS_AT_ONCE):
            part = records[first : first + _ROWS_AT_ONCE]
            rows = np.empty(len(part), DOCUMENT)
            number = starts[rank] + first
            low, high = np.searchsorted(dropped["document"], (number, number + len(part))).tolist()
            verdict = codes[part["verdict"]]
            lengths = np.diff(part["end"].astype(np.int64), prepend=last_end)
            last_end = int(part["end"][-1])
            for exact, name in ((True, EXACT_DUPLICATE), (False, NEAR_DUPLICATE)):
                found = dropped["document"][low:high][dropped["exact"][low:high] == exact] - number
                verdict[found] = verdicts.index(name)
            lengths[verdict != 0] = 0
            rows["end"] = tokens[0] + np.cumsum(lengths)
            rows["file"], rows["digest"], rows["verdict"] = part["file"], part["digest"], verdict
            rows["line"] = part["line"] + lines[part["file"]]
            tokens[0] = int(rows["end"][-1])
            for code, count in zip(*(found.tolist() for found in np.unique(verdict, return_counts=True)), strict=True):
                counts[code] += count
            yield rows.tobytes()
