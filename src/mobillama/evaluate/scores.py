"""From answers to scores: the harness judges each question, tasks become benchmarks, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobillama.evaluate.samples import Answer
from mobillama.evaluate.suites import Benchmark

if TYPE_CHECKING:
    from mobillama.evaluate.requests import LoadedTask


def score_task(task: LoadedTask, answers: dict[tuple[str, int], Answer]) -> dict[str, Any]:
    """Return a task's number of questions, how many have no single likeliest choice, and the harness's metrics.

    Each metric has its value and its standard error (None: it has none).
    """
    from lm_eval.api.metrics import mean, mean_stderr

    values: dict[str, list[Any]] = {}
    ties = 0
    documents = sorted(set(task.requests.documents))
    for document in documents:
        logprobs, greedy = answers[task.name, document]
        ties += len(logprobs) > 1 and logprobs.count(max(logprobs)) > 1
        results = logprobs if task.rolling else list(zip(logprobs, greedy, strict=True))
        for metric, value in task.task.process_results(task.task.task_docs[document], results).items():
            values.setdefault(metric, []).append(value)
    metrics = {}
    for metric, found in values.items():
        aggregate = task.task.aggregation()[metric]
        error = None
        if len(found) > 1 and aggregate is mean:
            error = float(mean_stderr(found))
        elif len(found) > 1 and metric == "bits_per_byte":
            error = _ratio_stderr(found)
        metrics[metric] = {"value": float(aggregate(found)), "stderr": error}
    return {
        "questions": len(documents),
        "ties": ties,
        "version": str(task.task.VERSION),
        "digest": task.digest,
        "metrics": metrics,
    }


def _ratio_stderr(pairs: Sequence[tuple[float, int]]) -> float:
    """Return the standard error of total nats over total bytes, in bits, over independent documents (delta method)."""
    ratio = sum(nats for nats, _ in pairs) / sum(size for _, size in pairs)
    squares = sum((nats - ratio * size) ** 2 for nats, size in pairs)
    count = len(pairs)
    return math.sqrt(count / (count - 1) * squares) / sum(size for _, size in pairs) / math.log(2)


def score_benchmark(benchmark: Benchmark, tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a benchmark's score of its tasks' (:func:`score_task`), in percent unless it is bits per byte."""
    counts = [task["questions"] for task in tasks]
    metrics = [task["metrics"][benchmark.metric] for task in tasks]
    weights = [count / sum(counts) if benchmark.pooled else 1 / len(tasks) for count in counts]
    scale = 1 if benchmark.metric == "bits_per_byte" else 100
    errors = [metric["stderr"] for metric in metrics]
    known = all(error is not None for error in errors)
    return {
        "score": scale * sum(weight * metric["value"] for weight, metric in zip(weights, metrics, strict=True)),
        "stderr": scale * math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) if known else None,
        "metric": benchmark.label or benchmark.metric,
        "shots": benchmark.shots,
        "questions": sum(counts),
        "ties": sum(task["ties"] for task in tasks),
        "tasks": len(tasks),
        "chance": benchmark.chance,
    }
