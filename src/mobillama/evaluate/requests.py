"""What a suite asks: the harness's requests of every task and their tokens, made once and kept for all checkpoints.

Both caches are named by what they were made of. Requests: harness, task with its version and prompts, number of examples,
seed, chosen questions, and the documents themselves. Tokens: those, the tokenizer's files, and its special tokens. So nothing
has to be cleared when one of these changes; a file that was cut short is made again.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import datasets
import lm_eval
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.task import ConfigurableTask

from mobillama.errors import UsageError, cause
from mobillama.evaluate.encode import Encoded, TextTokenizer, encode
from mobillama.evaluate.suites import Benchmark, Suite, task_config
from mobillama.record.files import replaced_file, sha256_bytes, sha256_json

SEED = 1234  # of examples and chosen questions; the harness's default
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Requests:
    """The requests of a task, all choices of a question one after another."""

    documents: list[int]
    """The question that each belongs to, as a place in the task's documents."""
    contexts: list[str]
    continuations: list[str]
    """What is scored behind the context; of a rolling task the whole text, and the context is empty."""

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class LoadedTask:
    """A task of the harness with its requests."""

    name: str
    benchmark: Benchmark
    task: Any
    requests: Requests
    digest: str
    """Of everything that the requests were made of."""

    @cached_property
    def rolling(self) -> bool:
        """Whether whole texts are scored, in windows of the model's length."""
        return bool(self.task.OUTPUT_TYPE == "loglikelihood_rolling")


def load_tasks(suite: Suite, folder: Path | None, cache: Path, limit: int, progress: Progress) -> list[LoadedTask]:
    """Return the tasks of a suite with their requests, from the cache where they are.

    Args:
        suite: what to ask.
        folder: local copies of the data sets, as :func:`mobillama.evaluate.suites.task_config` wants them; None: the hub.
        cache: directory of the caches.
        limit: questions of each task at most; 0: as many as the suite asks.
        progress: told (stage, tasks done, all tasks).

    Raises:
        UsageError: data are missing, on disk (all that is missing is named at once) or on the hub.
    """
    places = dict.fromkeys(benchmark.place for benchmark in suite.benchmarks)
    missing = [place for place in places if folder and not (folder / place).exists()]
    if missing:
        raise UsageError(
            f"{folder}: lacks {', '.join(missing)}; copy the hub's data sets and the plain files there under these names "
            "(docs/evaluation.md), or leave out --benchmarks to read all from the hub"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    wanted = [(benchmark, file) for benchmark in suite.benchmarks for file in benchmark.files]
    loaded = []
    for number, (benchmark, file) in enumerate(wanted):
        progress("load benchmarks", number, len(wanted))
        config = task_config(benchmark, file, folder, cache)
        try:
            task = ConfigurableTask(config=dict(config))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            place = folder / benchmark.place if folder else f"the hub's data set '{benchmark.data}'"
            remedy = "complete the copy" if folder else "go online, or name a directory of copies with --benchmarks"
            raise UsageError(f"{place}: {cause(error)}; {remedy}") from None
        loaded.append(_with_requests(benchmark, task, config, cache, limit))
    progress("load benchmarks", len(wanted), len(wanted))
    return loaded


def _with_requests(benchmark: Benchmark, task: Any, config: dict[str, Any], cache: Path, limit: int) -> LoadedTask:
    documents = len(task.task_docs)
    count = min(limit or documents, benchmark.questions or documents, documents)
    chosen = sorted(random.Random(SEED).sample(range(documents), count))  # noqa: S311
    made_of = {
        "harness": lm_eval.__version__,
        "task": {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs")},
        "seed": SEED,
        "chosen": chosen if count < documents else "all",
        "documents": _content(task.task_docs),
        "examples": _content(task.sampler.df) if benchmark.shots else "",
    }
    digest = sha256_bytes(json.dumps(made_of, sort_keys=True, default=_described).encode())
    path = cache / f"requests-{digest[:24]}.parquet"
    try:
        requests = _read(path)
    except (OSError, pa.ArrowException):
        requests = _build(task, chosen)
        _write(path, requests)
    return LoadedTask(task.config.task, benchmark, task, requests, digest)


def _content(documents: Iterable[dict[str, Any]]) -> str:
    return sha256_bytes(json.dumps(list(documents), sort_keys=True, default=str).encode())


def _described(value: Any) -> str:
    return inspect.getsource(value) if callable(value) else str(value)


def _build(task: Any, chosen: list[int]) -> Requests:
    """Let the harness write all contexts, as it does with examples drawn from one seed by one process."""
    task.set_fewshot_seed(SEED)
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
        task.build_all_requests(samples=chosen if len(chosen) < len(task.task_docs) else None)
    instances = task.instances
    arguments = [instance.args if len(instance.args) == 2 else ("", *instance.args) for instance in instances]
    contexts, continuations = (list(texts) for texts in zip(*arguments, strict=True))
    return Requests([chosen[instance.doc_id] for instance in instances], contexts, continuations)


def _read(path: Path) -> Requests:
    columns = pq.read_table(path).to_pydict()
    return Requests(columns["document"], columns["context"], columns["continuation"])


def _write(path: Path, requests: Requests) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "document": pa.array(requests.documents, pa.int32()),
        "context": pa.array(requests.contexts).dictionary_encode(),
        "continuation": pa.array(requests.continuations),
    }
    with replaced_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def load_tokens(
    tasks: list[LoadedTask], tokenizer: TextTokenizer, cache: Path, progress: Progress = lambda *told: None
) -> list[Encoded]:
    """Return the tokens of each task's requests, from the cache where they are."""
    encoded = []
    for number, task in enumerate(tasks):
        progress("tokenise", number, len(tasks))
        digest = sha256_json({"requests": task.digest, "tokenizer": tokenizer.digest})
        path = cache / f"tokens-{digest[:24]}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = Encoded(**stored)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            found = encode(tokenizer, task.requests.contexts, task.requests.continuations, task.rolling)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **vars(found))
        encoded.append(found)
    progress("tokenise", len(tasks), len(tasks))
    return encoded
