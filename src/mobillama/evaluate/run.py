"""One suite, any number of models: what they share is made once; each evaluation is a directory that is done, or goes on.

``DIRECTORY/result.json`` is written last and at once, with ``"status": "done"`` or ``"failed"`` and the error. What is done is
not done again as long as model, questions and precision are the same; else it moves to ``DIRECTORY/earlier-KEY``. What failed
is tried again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobillama.data.dataset import Dataset
from mobillama.errors import DivergedError, MobiLlamaError, cause
from mobillama.evaluate.heldout import evaluate_heldout
from mobillama.evaluate.model import ModelFiles, load
from mobillama.evaluate.results import FORMAT, RESULT_FILE, read_result
from mobillama.evaluate.samples import SAMPLES_FILE, Samples, open_samples
from mobillama.evaluate.scorer import Scorer
from mobillama.evaluate.scores import score_benchmark, score_task
from mobillama.evaluate.suites import Suite
from mobillama.record.environment import environment
from mobillama.record.files import sha256_file, sha256_json, write_json
from mobillama.record.lock import locked
from mobillama.train.device import choose_device, choose_precision, describe_device, keep_freed_memory

if TYPE_CHECKING:
    from mobillama.evaluate.encode import Encoded, TextTokenizer
    from mobillama.evaluate.requests import LoadedTask

Progress = Callable[..., None]
_OTHER_WEIGHTS = "evaluate an earlier checkpoint; if it was in bfloat16, try --precision float32"
SCORING = 2  # one more whenever the same model comes to answer otherwise; 2: logits in float32


@dataclass
class Evaluator:
    """Evaluates models on a suite.

    Args:
        suite: without benchmarks, only the hold-out is read.
        folder: local copies of the benchmarks' data; None: the hub.
        cache: directory of what is kept for later evaluations.
        limit: questions of each task, and held-out sequences of each source, at most; 0: all.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``float32``, ``float64`` or ``bfloat16``.
        dataset: whose hold-out is read too, or None.
        progress: told (stage, done, total, facts).
    """

    suite: Suite
    folder: Path | None
    cache: Path
    limit: int
    device: str
    precision: str
    dataset: Dataset | None
    progress: Progress

    def __post_init__(self) -> None:
        self._device = choose_device(self.device)
        if self._device.type == "cpu":
            keep_freed_memory()
        self._precision = choose_precision(self.precision, self._device)
        self._tokens: dict[str, list[Encoded]] = {}
        self._packs: dict[str, bool] = {}

    @cached_property
    def tasks(self) -> list[LoadedTask]:
        """The suite's tasks with their requests."""
        if not self.suite.benchmarks:
            return []
        from mobillama.evaluate.requests import load_tasks

        return load_tasks(self.suite, self.folder, self.cache, self.limit, self.progress)

    def key(self, files: ModelFiles) -> dict[str, Any]:
        """Return what an evaluation's result depends on."""
        return {"model": files.digest, **self.protocol}

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """What the result depends on beside the model."""
        return {
            "suite": self.suite.name,
            "questions": sha256_json([task.digest for task in self.tasks]),
            "holdout": self.dataset and self.dataset.digest,
            "limit": self.limit,
            "precision": self._precision,
            "scoring": SCORING,
        }

    def evaluate(self, files: ModelFiles, directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Evaluate a model into ``directory``, unless that is done and its samples are whole; return what ``result.json`` says.

        Args:
            files: the model.
            directory: of this evaluation; made where it is missing.
            facts: what else is known of the model, a checkpoint's step and tokens say; recorded.

        Raises:
            LockedError: another process evaluates into the directory.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory, "an evaluation"):
            key = self.key(files)
            known = read_result(directory)
            if known and known["status"] == "done" and known["key"] == key and _samples_are_whole(directory, known):
                return known
            _set_aside(directory)
            model = {"name": files.name, "sha256": files.sha256, **facts}
            started = time.perf_counter()
            try:
                found = self._evaluate(files, directory)
            except Exception as error:  # whatever a model breaks, the next one is evaluated
                found = _failure(error)
            return _write(directory, {"key": key, "model": model, **found}, started)

    def _evaluate(self, files: ModelFiles, directory: Path) -> dict[str, Any]:
        found: dict[str, Any] = {
            "status": "done",
            "device": describe_device(self._device),
            "precision": self._precision,
        }
        if self.dataset is not None:
            held_out = evaluate_heldout(
                files.directory,
                self.dataset,
                self.device,
                self.limit,
                lambda done, all: self.progress("hold-out", done, all),
            )
            if not math.isfinite(held_out["loss"]):
                raise DivergedError(f"{files.name}: its loss on the hold-out is {held_out['loss']}; {_OTHER_WEIGHTS}")
            found["holdout"] = held_out
        if not self.tasks:
            return found
        with open_samples(directory, self.key(files)) as samples:
            facts = self._answer(files, samples)
        tasks = {task.name: score_task(task, samples.answers) for task in self.tasks}
        benchmarks = {
            benchmark.name: score_benchmark(
                benchmark, [tasks[task.name] for task in self.tasks if task.benchmark.name == benchmark.name]
            )
            for benchmark in self.suite.benchmarks
        }
        scores = [facts["score"] for facts in benchmarks.values()]
        return {
            **found,
            "harness": f"lm_eval {version('lm_eval')}",
            "benchmarks": benchmarks,
            "average": sum(scores) / len(scores) if self.suite.name != "perplexity" else None,
            **facts,
            "tasks": tasks,
            "samples": {"file": SAMPLES_FILE, "sha256": sha256_file(directory / SAMPLES_FILE)},
        }

    def _answer(self, files: ModelFiles, samples: Samples) -> dict[str, Any]:
        """Score all requests that are not answered yet; return how that went."""
        from lm_eval.models.utils import resolve_max_length

        from mobillama.evaluate.encode import TextTokenizer, to_sequences

        model, tokenizer = load(files, self._device)
        texts = TextTokenizer(tokenizer, files.tokenizer_digest, self.suite.special_tokens)
        encoded, context_length = self._encoded(texts), resolve_max_length(model.config, tokenizer)
        sequences, questions, truncated = [], [], {"contexts": 0, "continuations": 0}
        open_questions: dict[tuple[str, int], _Question] = {}
        for task, tokens in zip(self.tasks, encoded, strict=True):
            found, request_of, lost = to_sequences(tokens, context_length)
            truncated = {name: count + getattr(lost, name) for name, count in truncated.items()}
            numbers = _numbers_within(task.requests.documents)
            for sequence, request in zip(found, request_of, strict=True):
                name = (task.name, task.requests.documents[request])
                if name in samples.answers:
                    continue
                question = open_questions.setdefault(name, _Question(name))
                question.expect(numbers[request])
                sequences.append(sequence)
                questions.append((question, numbers[request]))
        started, asked = time.perf_counter(), len(sequences)
        longest = max((len(sequence.inputs) for sequence in sequences), default=1)
        try:
            scorer, packs = self._scorer(model, longest, any(number for _, number in questions))
        except DivergedError as error:
            raise DivergedError(f"{files.name}: {error}") from None
        wanted_tokens, answered = scorer.batch_tokens, 0
        for scores in scorer.score(sequences):
            for score in scores:
                question, number = questions[score.sequence]
                if math.isnan(score.logprob):
                    raise DivergedError(
                        f"{files.name}: gives NaN as a log-probability ({'/'.join(map(str, question.name))}); {_OTHER_WEIGHTS}"
                    )
                if question.take(number, score.logprob, score.is_greedy):
                    samples.add(*question.name, question.logprobs, question.greedy)
            samples.flush()
            answered += len(scores)
            speed = scorer.tokens / (time.perf_counter() - started)
            self.progress(f"answer: {files.name}", answered, asked, f"{speed:,.0f} tokens/s")
        return {
            "context_length": context_length,
            "truncated": truncated,
            "requests": sum(len(task.requests) for task in self.tasks),
            "sequences_scored": asked,
            "packed": packs,
            "batch_tokens": scorer.batch_tokens,
            "memory_ran_out": scorer.batch_tokens < wanted_tokens,
            "tokens_forwarded": scorer.tokens,
            "model_seconds": round(time.perf_counter() - started, 2),
        }

    def _scorer(self, model: Any, longest: int, shares: bool) -> tuple[Scorer, bool | None]:
        """Return a scorer, and whether it packs; None: not tried, as no two requests ``shares`` a question.

        How an architecture takes masks is found out once for all its checkpoints.
        """
        if not shares:
            return Scorer(model, self._precision, longest, packs=False), None
        config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
        architecture = json.dumps([type(model).__name__, config, longest], sort_keys=True, default=str)
        scorer = Scorer(model, self._precision, longest, packs=self._packs.get(architecture))
        self._packs[architecture] = scorer.packs
        return scorer, scorer.packs

    def _encoded(self, texts: TextTokenizer) -> list[Encoded]:
        from mobillama.evaluate.requests import load_tokens

        if texts.digest not in self._tokens:
            self._tokens = {texts.digest: load_tokens(self.tasks, texts, self.cache, self.progress)}
        return self._tokens[texts.digest]


def record_failure(directory: Path, name: str, facts: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Write that a model could not even be opened, and return that result.

    Raises:
        LockedError: another process evaluates into the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, "an evaluation"):
        _set_aside(directory)
        found = {"key": None, "model": {"name": name, **facts}, **_failure(error)}
        return _write(directory, found, time.perf_counter())


def _samples_are_whole(directory: Path, result: dict[str, Any]) -> bool:
    """Tell whether the samples beside a result are those that it was computed from."""
    if "samples" not in result:
        return True
    path = directory / result["samples"]["file"]
    return path.is_file() and sha256_file(path) == result["samples"]["sha256"]


def _set_aside(directory: Path) -> None:
    """Move what is done in a directory, and not wanted now, into one of its own below; remove a record of a failure.

    So no result ever stands beside the samples of another evaluation.
    """
    known = read_result(directory)
    if known and known["status"] == "done":
        earlier = directory / f"earlier-{sha256_json(known['key'])[:8]}"
        earlier.mkdir(exist_ok=True)
        # The result moves last: killed in between, it still says that this is to be done again.
        for name in (SAMPLES_FILE, RESULT_FILE):
            if (directory / name).is_file():
                (directory / name).replace(earlier / name)
    (directory / RESULT_FILE).unlink(missing_ok=True)


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, MobiLlamaError):
        return {"status": "failed", "error": str(error), "exit_code": error.exit_code}
    return {"status": "failed", "error": f"{type(error).__name__}: {cause(error)}", "exit_code": 3}


def _write(directory: Path, found: dict[str, Any], started: float) -> dict[str, Any]:
    seconds = float(time.perf_counter() - started)
    result = {"format": FORMAT, **found, "seconds": round(seconds, 2), "environment": environment()}
    write_json(directory / RESULT_FILE, result)
    return result


class _Question:
    """Choices of a question as their scores come in, each of one or more sequences."""

    def __init__(self, name: tuple[str, int]) -> None:
        self.name = name
        self.logprobs: list[float] = []
        self.greedy: list[bool] = []
        self._missing = 0

    def expect(self, choice: int) -> None:
        """Wait for one more sequence of a choice."""
        self._missing += 1
        if choice == len(self.logprobs):
            self.logprobs.append(0.0)
            self.greedy.append(True)

    def take(self, choice: int, logprob: float, is_greedy: bool) -> bool:
        """Add a sequence's score; return whether all are there."""
        self.logprobs[choice] += logprob
        self.greedy[choice] &= is_greedy
        self._missing -= 1
        return self._missing == 0


def _numbers_within(documents: list[int]) -> list[int]:
    """Return the number of each request among those of its document, which follow one another."""
    numbers: list[int] = []
    for index, document in enumerate(documents):
        numbers.append(numbers[-1] + 1 if index and documents[index - 1] == document else 0)
    return numbers
