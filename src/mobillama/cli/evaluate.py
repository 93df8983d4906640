"""Verbs that judge: evaluate, table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mobillama.cli.verbs import add_verb, at_least
from mobillama.errors import UsageError
from mobillama.evaluate.suites import SUITES

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    verb = add_verb(verbs, "evaluate", _evaluate, "score models on benchmarks, and in bits per byte on the hold-out")
    verb.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a model directory (a checkpoint's model/), a GGUF file, or a repository of the hub",
    )
    verb.add_argument(
        "--suite",
        required=True,
        choices=tuple(SUITES),
        help="; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values()),
    )
    verb.add_argument("--benchmarks", type=Path, metavar="DIR", help="local copies of the data (default: the hub)")
    verb.add_argument("--data", type=Path, metavar="DIR", help="perplexity: the prepared data whose hold-out is read")
    verb.add_argument("--baselines", action="store_true", help="perplexity: compressors and n-gram models beside it")
    verb.add_argument("--all-checkpoints", action="store_true", help="MODEL is a run: each of its checkpoints")
    verb.add_argument("--follow", action="store_true", help="with --all-checkpoints: until the run has ended")
    verb.add_argument(
        "--revisions", nargs="+", default=[], metavar="NAME", help="of the repository MODEL, e.g. ckpt_100; or all"
    )
    verb.add_argument(
        "--limit",
        type=at_least(1),
        default=0,
        metavar="N",
        help="questions of each task, sequences of each source (default: all)",
    )
    verb.add_argument(
        "--out", type=Path, help="where results go (default: evals; of a run's checkpoints, evals within the run)"
    )
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    verb.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32", "float64"),
        default="auto",
        help="auto: bfloat16 where this hardware is fast in it (default: %(default)s)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")

    verb = add_verb(verbs, "table", _table, "print a table of the paper beside our rows, its doubtful cells marked")
    verb.add_argument("number", type=int, metavar="3|5|7|9", help="of the table")
    verb.add_argument(
        "--ours",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="evaluations in suite paper, e.g. evals/paper/NAME",
    )


def _evaluate(args: argparse.Namespace) -> None:
    from mobillama.workflows.evaluation import Settings, evaluate_models, evaluate_run

    if args.baselines and args.data is None and not args.all_checkpoints:
        raise UsageError("--baselines: are computed on a hold-out; name the prepared data with --data")
    for option, value in (("--data", args.data), ("--baselines", args.baselines)):
        if value and args.suite != "perplexity":
            raise UsageError(f"{option}: belongs to --suite perplexity alone; leave it out")
    settings = Settings(args.suite, args.benchmarks, args.data, args.limit, args.device, args.precision)
    if not args.all_checkpoints:
        if args.follow:
            raise UsageError("--follow: goes with --all-checkpoints")
        evaluate_models(args.models, args.revisions, settings, args.out, args.baselines, args.json)
        return
    if len(args.models) != 1 or args.revisions:
        raise UsageError("--all-checkpoints: takes one run directory as MODEL, and no --revisions")
    if args.out is not None:
        raise UsageError("--out: results of --all-checkpoints go into the run, below evals; leave it out")
    evaluate_run(Path(args.models[0]), settings, args.follow, args.baselines, args.json)


def _table(args: argparse.Namespace) -> None:
    from mobillama.workflows.papertables import show_table

    show_table(args.number, args.ours)
