"""Suites: which benchmarks, with how many examples, by which metric; the paper's protocol and the harness's own.

Paper, section 4 ("Evaluation Benchmarks and Metrics"): HellaSwag 10, ARC-Challenge 25, WinoGrande 5 and MMLU 5 examples,
none for the rest, on LLM360's Analysis360, a fork of lm-eval 0.3. Where today's harness asks otherwise, the older prompt is
restored here; docs/evaluation.md says what cannot be restored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobillama.errors import UsageError, did_you_mean
from mobillama.evaluate.prompts import lambada_documents, race_version_2, wikitext_pages
from mobillama.record.files import sha256_json
from mobillama.record.manifest import describe_files

BIASES = """
    age autre disability gender nationality physical_appearance race_color religion sexual_orientation socioeconomic
""".split()  # noqa: SIM905 one name a line would say no more
SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions
""".split()  # noqa: SIM905 one name a line would say no more


@dataclass(frozen=True)
class Benchmark:
    """One number of a table: tasks of the harness, and how their scores become one."""

    name: str
    """As in the paper's tables."""
    metric: str
    """Of the harness's task."""
    files: tuple[str, ...]
    """The tasks' configuration files, below lm_eval/tasks, without ``.yaml``."""
    data: str
    """Hub id of the data set; a local copy lies in a directory of this name."""
    shots: int = 0
    chance: float | None = None
    """What guessing reaches, in percent; None: the score is no percentage."""
    pooled: bool = False
    """Average over all questions, instead of over the tasks whatever their size."""
    questions: int = 0
    """How many questions of each task are asked, drawn once and for all; 0: all."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What differs from the packaged task."""
    label: str = ""
    """What the metric is called where the harness's name for it says too little."""
    local: str = ""
    """File of a local copy that is no copy of the hub's repository; ``custom_dataset`` makes its documents."""

    @property
    def place(self) -> str:
        """Where its data are in a folder of local copies."""
        return self.local or self.data


@dataclass(frozen=True)
class Suite:
    """Benchmarks asked in one protocol."""

    name: str
    about: str
    benchmarks: tuple[Benchmark, ...]
    special_tokens: bool
    """Whether the tokenizer adds what it adds by default, such as a BOS. lm-eval 0.3, and so the paper, added nothing,
    and put the end mark before a text without context."""


def _nine(shots: dict[str, int]) -> tuple[Benchmark, ...]:
    """Return the nine benchmarks of Tables 3 and 9 as the harness has them."""
    rows = (
        ("HellaSwag", "acc_norm", ("hellaswag/hellaswag",), "Rowan/hellaswag", 25.0),
        ("TruthfulQA", "acc", ("truthfulqa/truthfulqa_mc2",), "truthfulqa/truthful_qa", None),
        ("MMLU", "acc", tuple(f"mmlu/default/mmlu_{name}" for name in SUBJECTS), "cais/mmlu", 25.0),
        ("ARC-C", "acc_norm", ("arc/arc_challenge",), "allenai/ai2_arc", 25.0),
        (
            "CrowS-Pairs",
            "pct_stereotype",
            ("crows_pairs/crows_pairs_english",),
            "jannalu/crows_pairs_multilingual",
            50.0,
        ),
        ("PIQA", "acc_norm", ("piqa/piqa",), "baber/piqa", 50.0),
        ("RACE", "acc", ("race/race",), "EleutherAI/race", 25.0),
        ("SIQA", "acc", ("siqa/siqa",), "lighteval/siqa", 100 / 3),
        ("WinoGrande", "acc", ("winogrande/default",), "allenai/winogrande", 50.0),
    )
    labels = {"TruthfulQA": "mc2"}
    return tuple(
        Benchmark(name, metric, files, data, shots.get(name, 0), chance, label=labels.get(name, ""))
        for name, metric, files, data, chance in rows
    )


PAPER_CHANGES: dict[str, dict[str, Any]] = {
    # The paper's number is the mean of the ten kinds of bias, each of which is a task of its own.
    "CrowS-Pairs": {"files": tuple(f"crows_pairs/crows_pairs_english_{bias}" for bias in BIASES)},
    "RACE": {"changes": {"doc_to_text": race_version_2, "metadata": {"version": 2.0}}},
    "SIQA": {
        "metric": "acc_norm",
        "changes": {
            "doc_to_text": "Question: {{context}}\n{{question}}\nAnswer: ",
            "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": "0.3 of the harness"},
        },
    },
}
PAPER = tuple(
    replace(benchmark, **PAPER_CHANGES.get(benchmark.name, {}))
    for benchmark in _nine({"HellaSwag": 10, "MMLU": 5, "ARC-C": 25, "WinoGrande": 5})
)
TODAY = tuple(replace(benchmark, pooled=True) for benchmark in _nine({}))
# Questions of each task, so that a 135M model answers all in minutes on two CPU cores; long examples weigh most.
QUICK = {
    "HellaSwag": 80,
    "TruthfulQA": 60,
    "MMLU": 2,
    "ARC-C": 60,
    "CrowS-Pairs": 20,
    "PIQA": 200,
    "RACE": 60,
    "SIQA": 200,
    "WinoGrande": 120,
}
# The harness asks LAMBADA for its last words alone; as bits per byte, all of each text counts.
WHOLE_TEXTS: dict[str, Any] = {
    "task": "lambada_openai_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
PERPLEXITY = (
    Benchmark(
        "WikiText-2",
        "bits_per_byte",
        ("wikitext/wikitext",),
        "EleutherAI/wikitext_document_level",
        local="wikitext2/wiki.test.raw",
        changes={"custom_dataset": wikitext_pages},
    ),
    Benchmark(
        "LAMBADA",
        "acc",
        ("lambada/lambada_openai",),
        "EleutherAI/lambada_openai",
        local="lambada/lambada_openai.jsonl",
        changes={"custom_dataset": lambada_documents},
    ),
    Benchmark(
        "LAMBADA, text",
        "bits_per_byte",
        ("lambada/lambada_openai",),
        "EleutherAI/lambada_openai",
        local="lambada/lambada_openai.jsonl",
        changes={"custom_dataset": lambada_documents, **WHOLE_TEXTS},
    ),
)
SUITES = {
    suite.name: suite
    for suite in (
        Suite("paper", "the paper's nine benchmarks in its protocol", PAPER, special_tokens=False),
        Suite("today", "the same nine as today's harness asks them by default", TODAY, special_tokens=True),
        Suite(
            "quick",
            "a fixed part of the paper's questions",
            tuple(replace(benchmark, questions=QUICK[benchmark.name]) for benchmark in PAPER),
            special_tokens=False,
        ),
        Suite(
            "perplexity",
            "bits per byte of the hold-out, WikiText-2 and LAMBADA, and LAMBADA's last words",
            PERPLEXITY,
            special_tokens=False,
        ),
    )
}


def find_suite(name: str) -> Suite:
    """Return the suite of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in SUITES:
        raise UsageError(f"--suite: unknown suite '{name}'{did_you_mean(name, SUITES)}; use {', '.join(SUITES)}")
    return SUITES[name]


def task_config(benchmark: Benchmark, file: str, folder: Path | None, cache: Path) -> dict[str, Any]:
    """Return the harness's configuration of a task, with its data in ``folder`` (None: from the hub).

    ``datasets`` knows a local copy again by the names of its directory and files alone, and would serve what it read from
    another copy before. So each content gets a directory of its own in ``cache``.

    """
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / f"{file}.yaml") | {"num_fewshot": benchmark.shots}
    for key in ("tag", "group"):
        config.pop(key, None)
    changes = dict(benchmark.changes)
    if folder is None:
        if benchmark.local:
            del changes["custom_dataset"]
        return config | changes
    place = folder / benchmark.place
    if benchmark.local:
        return config | changes | {"dataset_kwargs": {"path": place}}
    known_as = cache / f"datasets-{_digest(place)[:24]}"
    return config | changes | {"dataset_path": str(place), "dataset_kwargs": {"cache_dir": str(known_as)}}


@functools.cache
def _digest(directory: Path) -> str:
    return sha256_json(describe_files(directory))
