"""Tables 3, 5, 7 and 9 of the paper as printed, and what of them cannot be right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mobillama.errors import UsageError
from mobillama.evaluate.suites import PAPER

NINE = ("HellaSwag", "TruthfulQA", "MMLU", "ARC-C", "CrowS-Pairs", "PIQA", "RACE", "SIQA", "WinoGrande")


@dataclass(frozen=True)
class Row:
    """A model's line: its scores in percent in the order of the table's columns, and the printed average."""

    name: str
    size: str
    scores: tuple[float, ...]
    average: float
    printed: tuple[str, ...]
    """Scores and average, digit by digit."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]


def _rows(text: str) -> tuple[Row, ...]:
    """Read lines of ``name | size | scores … average``."""
    rows = []
    for line in text.strip().splitlines():
        name, size, numbers = (part.strip() for part in line.split("|"))
        *scores, average = map(float, printed := numbers.split())
        rows.append(Row(name, size, tuple(scores), average, tuple(printed)))
    return tuple(rows)


_CROWS = "CrowS-Pairs enters the average as higher-is-better, although 50 is unbiased"
TABLES = {
    3: PaperTable(
        "Table 3: models below 1B",
        NINE,
        _rows("""
gpt-neo-125m | 0.15B | 30.26 45.58 25.97 22.95 61.55 62.46 27.56 40.33 51.78 40.93
tiny-starcoder | 0.17B | 28.17 47.68 26.79 20.99 49.68 52.55 25.45 38.28 51.22 37.86
cerebras-gpt-256m | 0.26B | 28.99 45.98 26.83 22.01 60.52 61.42 27.46 40.53 52.49 40.69
opt-350m | 0.35B | 36.73 40.83 26.02 23.55 64.12 64.74 29.85 41.55 52.64 42.22
megatron-gpt2-345m | 0.38B | 39.18 41.51 24.32 24.23 64.82 66.87 31.19 40.28 52.96 42.81
LiteLlama | 0.46B | 38.47 41.59 26.17 24.91 62.90 67.73 28.42 40.27 49.88 42.26
gpt-sw3-356m | 0.47B | 37.05 42.55 25.93 23.63 61.59 64.85 32.15 41.56 53.04 42.48
pythia-410m | 0.51B | 40.85 41.22 27.25 26.19 64.20 67.19 30.71 41.40 53.12 43.57
xglm-564m | 0.56B | 34.64 40.43 25.18 24.57 62.25 64.85 29.28 42.68 53.03 41.87
Lamini-GPT-LM | 0.59B | 31.55 40.72 25.53 24.23 63.09 63.87 29.95 40.78 47.75 40.83
MobiLlama | 0.5B | 52.52 38.05 26.45 29.52 64.03 72.03 33.68 40.22 57.53 46.00
Lamini-GPT-LM | 0.77B | 43.83 40.25 26.24 27.55 66.12 69.31 37.12 42.47 56.59 45.49
MobiLlama | 0.8B | 54.09 38.48 26.92 30.20 64.82 73.17 33.37 41.60 57.45 46.67
"""),
        ("the text gives 49.06 as the 0.8B's average, which is large-base's of Table 9", _CROWS),
    ),
    5: PaperTable(
        "Table 5: baselines on 120 B tokens",
        NINE[:4],
        _rows("""
baseline1 | 0.54B | 42.44 38.16 25.12 26.18 32.97
baseline2 | 0.52B | 43.66 38.54 25.76 26.32 33.57
baseline3 | 0.22B | 28.41 25.02 16.68 17.01 21.78
MobiLlama | 0.52B | 48.42 39.36 26.56 27.88 35.55
"""),
        ("Table 1 gives 32.57 as baseline2's average; 33.57 is the mean of its row",),
    ),
    7: PaperTable(
        "Table 7: beside sliced models",
        ("HellaSwag", "ARC-C", "PIQA", "WinoGrande"),
        _rows("""
OPT-1.3B, 30 % sliced | 0.91B | 39.81 25.77 60.77 54.7 45.26
OPT-6.7B, 30 % sliced | 4.69B | 54.56 29.01 68.61 60.69 53.21
Llama-2-7B, 30 % sliced | 4.9B | 49.62 31.23 63.55 61.33 51.43
Phi2-2.7B, 30 % sliced | 1.89B | 47.56 30.29 65.94 63.14 51.73
MobiLlama | 0.5B | 52.52 29.52 72.03 57.53 52.90
MobiLlama | 0.8B | 54.09 30.20 73.17 57.45 53.72
"""),
        ("the sliced models had no fine-tuning after slicing, although the text says so",),
    ),
    9: PaperTable(
        "Table 9: fully open models below 2B",
        NINE,
        _rows("""
Boomer | 1B | 31.62 39.42 25.42 22.26 61.26 57.99 28.99 40.32 50.98 39.80
Pythia-Dedup | 1B | 49.63 38.92 24.29 29.09 67.11 70.23 32.44 42.63 53.98 45.36
Falcon-RW | 1B | 63.12 35.96 25.36 35.06 69.04 74.10 36.07 40.23 61.88 48.98
TinyLlama | 1.1B | 60.22 37.59 26.11 33.61 70.60 73.28 36.45 41.65 59.18 48.74
OLMo | 1.2B | 62.50 32.94 25.86 34.45 69.59 73.70 36.74 41.14 58.90 48.42
Cerebras-GPT | 1.3B | 38.51 42.70 26.66 26.10 63.67 66.75 30.33 42.42 53.59 43.41
Lamini | 1.3B | 38.05 36.43 28.47 26.62 64.62 67.89 33.39 43.19 50.59 43.25
OPT | 1.3B | 54.50 38.67 24.63 29.6 70.70 72.47 34.16 42.47 59.74 47.43
GPT-NEO | 1.3B | 48.49 39.61 24.82 31.31 65.67 71.05 34.06 41.81 57.06 45.98
Pythia-Deduped | 1.4B | 55.00 38.63 25.45 32.59 67.33 72.68 34.64 42.68 56.90 47.32
large-base | 1.2B | 62.99 35.90 24.79 34.55 68.49 75.57 35.31 41.96 62.03 49.06
"""),
        (_CROWS,),
    ),
}
# Accuracies over one set of questions are multiples of 1 / questions; means over several sets, or of probabilities, are not.
QUESTIONS = {
    "HellaSwag": 10042,
    "TruthfulQA": 817,
    "MMLU": 14042,
    "ARC-C": 1172,
    "CrowS-Pairs": 1677,
    "PIQA": 1838,
    "RACE": 1045,
    "SIQA": 1954,
    "WinoGrande": 1267,
}
_MEANS = ("TruthfulQA", "MMLU", "CrowS-Pairs")
# What guessing reaches; of CrowS-Pairs, less than that is no worse.
_CHANCE = {benchmark.name: benchmark.chance for benchmark in PAPER if benchmark.name != "CrowS-Pairs"}
_ERRORS_BELOW = 3


def find_table(number: int) -> PaperTable:
    """Return a table of the paper.

    Raises:
        UsageError: it is none of those that hold scores.
    """
    if number not in TABLES:
        raise UsageError(f"{number}: not one of the paper's tables of scores; use {', '.join(map(str, TABLES))}")
    return TABLES[number]


def doubts(table: PaperTable, row: Row) -> dict[str, str]:
    """Return the reason to doubt each suspicious cell of a row, by column; the average is one of them."""
    found = {}
    for column, score in zip(table.columns, row.scores, strict=True):
        if reason := _doubt(column, score):
            found[column] = reason
        elif "sliced" in row.name and column != "PIQA":
            found[column] = "other protocol: no examples in SliceGPT's own table, 5 to 25 in MobiLlama's rows"
    mean = sum(row.scores) / len(row.scores)
    if _truncated(mean) != row.average:
        found["average"] = f"the mean of the row is {mean:.4f}"
    return found


def _doubt(column: str, score: float) -> str:
    count, chance = QUESTIONS[column], _CHANCE.get(column)
    if chance is not None:
        error = math.sqrt(chance * (100 - chance) / count)
        if score < chance - _ERRORS_BELOW * error:
            return f"below chance: {chance:.4g} ± {error:.2f} is guessing, this is {(chance - score) / error:.1f} errors less"
    if column not in _MEANS and not is_attainable(score, count):
        return f"not attainable: no k of {count:,} questions gives it, rounded or truncated"
    return ""


def is_attainable(score: float, count: int) -> bool:
    """Tell whether a percentage of two decimals is k right answers of ``count``, rounded or truncated."""
    nearest = round(score * count / 100)
    shares = [100 * k / count for k in range(nearest - 1, nearest + 2)]
    return any(score in (round(share, 2), _truncated(share)) for share in shares)


def _truncated(value: float) -> float:
    """Return a value cut to two decimals, as all printed averages are."""
    return math.floor(100 * value + 1e-6) / 100


def our_row(table: PaperTable, result: dict[str, Any]) -> list[float]:
    """Return the scores and the average of one of our evaluations in suite ``paper``, for a table's columns.

    Raises:
        UsageError: the evaluation failed, or was made in another suite or on a part of the questions.
    """
    name = result["model"]["name"]
    if result["status"] != "done":
        raise UsageError(f"--ours: the evaluation of {name} failed; run it again")
    key = result["key"]
    if key["suite"] != "paper":
        raise UsageError(f"--ours: {name}: evaluated in suite {key['suite']}; evaluate it with --suite paper")
    if key["limit"]:
        raise UsageError(f"--ours: {name}: evaluated with --limit {key['limit']}; evaluate again without it")
    for column in table.columns:
        asked = result["benchmarks"][column]["questions"]
        if asked != QUESTIONS[column]:
            raise UsageError(
                f"--ours: {name}: answered {asked:,} questions of {column}, which has {QUESTIONS[column]:,}; "
                "evaluate again on the whole data set"
            )
    scores = [result["benchmarks"][column]["score"] for column in table.columns]
    return [*scores, sum(scores) / len(scores)]
