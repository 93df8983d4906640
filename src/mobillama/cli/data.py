"""Verbs for what goes in: tokenizer, data, trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobillama.cli.verbs import add_group, add_verb, at_least, new_path
from mobillama.errors import UsageError

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    _add_tokenizer(add_group(verbs, "tokenizer", "train a tokenizer, compare tokenizers"))
    _add_data(add_group(verbs, "data", "prepare training data, verify it and look into it"))

    verb = add_verb(verbs, "trace", _trace, "find the documents and training steps that hold a text")
    verb.add_argument("path", type=Path, help="a run directory, or a prepared data directory")
    verb.add_argument("text", help="the exact text to look for")
    verb.add_argument("--limit", type=at_least(1), default=20, help="places to show (default: %(default)s)")
    verb.add_argument("--batch-size", type=at_least(1), help="sequences in a step (a run knows its own)")
    verb.add_argument(
        "--seed", type=at_least(0), help="seed of the order (a run knows its own; default: the prepared seed)"
    )
    verb.add_argument(
        "--epochs", type=at_least(1), default=1, help="how many passes over the data (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="print a JSON object a line")


def _add_tokenizer(group: Verbs) -> None:
    texts = (
        "files or directories of .jsonl (.gz .xz .zst), .parquet, .txt, or a preparation recipe (.yaml: its sources)"
    )
    verb = add_verb(group, "train", _tokenizer_train, "train a LLaMA-type BPE with byte fallback")
    verb.add_argument("texts", type=Path, nargs="+", help=texts)
    verb.add_argument(
        "--vocab-size", type=at_least(1), default=32000, help="number of ids (default: %(default)s, the paper's)"
    )
    verb.add_argument(
        "--sample-megabytes",
        type=at_least(1),
        default=200,
        help="text to learn from, the same share of each of TEXTS (default: %(default)s)",
    )
    verb.add_argument("--out", type=new_path, required=True, help="the .model file to write")
    verb.add_argument(
        "--compare",
        type=Path,
        nargs="*",
        default=[],
        metavar="TOKENIZER",
        help="others to report beside it, e.g. LLaMA's",
    )

    verb = add_verb(group, "compare", _tokenizer_compare, "print the bytes per token of tokenizers, source by source")
    verb.add_argument(
        "tokenizers", type=Path, nargs="+", help=".model or tokenizer.json files, or directories with one"
    )
    verb.add_argument("--texts", type=Path, nargs="+", required=True, help=texts)
    verb.add_argument("--sample-megabytes", type=at_least(1), default=20, help="of each source (default: %(default)s)")


def _add_data(group: Verbs) -> None:
    summary = "turn raw documents into ordered sequences; the same command goes on after a stop"
    verb = add_verb(group, "prepare", _data_prepare, summary, _prepare_recipe)
    verb.add_argument("recipe", type=Path, help="a preparation recipe (YAML)")
    verb.add_argument("--out", type=new_path, required=True, help="the data directory to make")
    verb.add_argument(
        "--executor", choices=("local", "slurm", "ray"), default="local", help="where tasks run (default: %(default)s)"
    )
    verb.add_argument(
        "--workers", type=at_least(0), default=0, help="tasks at a time (default: all cores, or the cluster's)"
    )
    verb.add_argument("--slurm-partition", default="", help="with slurm: the partition to submit to")
    verb.add_argument("--slurm-time", default="24:00:00", help="with slurm: time limit of a job (default: %(default)s)")
    verb.add_argument(
        "--memory-gb", type=at_least(1), default=2, help="with slurm, ray: GiB for a task (default: %(default)s)"
    )

    verb = add_verb(group, "verify", _data_verify, "hash everything again, and re-derive sequences from raw documents")
    verb.add_argument("path", type=Path, help="a prepared data directory")
    verb.add_argument(
        "--deep", type=at_least(0), default=0, metavar="N", help="also make N sequences anew from raw documents"
    )
    verb.add_argument("--seed", type=at_least(0), default=0, help="which N (default: %(default)s)")
    verb.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where a source's raw files are now (default: where they were prepared from)",
    )
    verb.add_argument("--workers", type=at_least(0), default=0, help="files hashed at a time (default: all cores)")

    verb = add_verb(
        group, "stats", _data_stats, "the paper's Table 2 of your corpus: tokens, documents, duplicates, drops"
    )
    verb.add_argument("path", type=Path, help="a prepared data directory")
    verb.add_argument("--picture", type=new_path, metavar="FILE.png", help="also draw it")
    verb.add_argument("--json", action="store_true", help="print JSON")

    verb = add_verb(group, "show", _data_show, "show what a training step learns from: text, source, documents")
    verb.add_argument("path", type=Path, help="a run directory, or a prepared data directory")
    verb.add_argument("--step", type=int, required=True, help="which step, counted from 1 as in metrics.jsonl")
    verb.add_argument("--batch-size", type=at_least(1), help="sequences in a step (a run knows its own)")
    verb.add_argument(
        "--seed", type=at_least(0), help="seed of the order (a run knows its own; default: the prepared seed)"
    )
    verb.add_argument(
        "--characters", type=at_least(0), default=300, help="of each sequence's text; 0: all (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="print a JSON object a line, with ids")

    verb = add_verb(
        group, "export", _data_export, "write LLM360's Amber chunks (JSON lines), or the ledger of documents"
    )
    verb.add_argument("path", type=Path, help="a prepared data directory")
    verb.add_argument("out", type=new_path, help="the directory to make; with --ledger the .jsonl file")
    verb.add_argument(
        "--ledger", action="store_true", help="a line for every raw document: hash, verdict, duplicate of"
    )

    verb = add_verb(group, "import", _data_import, "make training data of LLM360's Amber chunks, in their own order")
    verb.add_argument("path", type=Path, help="a directory of train_NNN.jsonl (also .gz .xz .zst)")
    verb.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer that made the ids")
    verb.add_argument("--out", type=new_path, required=True, help="the data directory to make")


def _prepare_recipe() -> type[Any]:
    from mobillama.recipe import PrepareRecipe

    return PrepareRecipe


def _tokenizer_train(args: argparse.Namespace) -> None:
    from mobillama.workflows.tokenizers import train_and_compare

    train_and_compare(args.texts, args.vocab_size, args.sample_megabytes, args.out, args.compare)


def _tokenizer_compare(args: argparse.Namespace) -> None:
    from mobillama.workflows.tokenizers import show_compression

    show_compression(args.tokenizers, args.texts, args.sample_megabytes)


def _data_prepare(args: argparse.Namespace) -> None:
    from mobillama.config import load_recipe
    from mobillama.console import note, progress
    from mobillama.data.prepare.pipeline import prepare
    from mobillama.data.prepare.stages import Execution
    from mobillama.recipe import PrepareRecipe
    from mobillama.workflows.corpus import note_passed_over, show_preparation

    recipe = load_recipe(PrepareRecipe, args.recipe, args.overrides)
    execution = Execution(args.executor, args.workers, args.slurm_partition, args.slurm_time, args.memory_gb)
    known = (args.out / "manifest.json").exists()
    note_passed_over(recipe)
    try:
        with progress() as show:
            manifest = prepare(recipe, args.out, show, execution)
    except KeyboardInterrupt:
        note("stopped; the same command goes on from the last finished task")
        raise
    show_preparation(args.out, manifest, known)


def _data_verify(args: argparse.Namespace) -> None:
    from mobillama.workflows.corpus import verify_corpus

    places = {}
    for word in args.source:
        name, equals, path = word.partition("=")
        if not equals:
            raise UsageError(f"--source: '{word}' is not NAME=PATH")
        places[name] = Path(path)
    verify_corpus(args.path, args.deep, args.seed, places, args.workers)


def _data_stats(args: argparse.Namespace) -> None:
    from mobillama.workflows.corpus import show_statistics

    show_statistics(args.path, args.picture, args.json)


def _data_show(args: argparse.Namespace) -> None:
    from mobillama.workflows.inspect import show_step

    show_step(args.path, args.step, args.batch_size, args.seed, args.characters, args.json)


def _data_export(args: argparse.Namespace) -> None:
    from mobillama.workflows.corpus import export_corpus, export_ledger

    (export_ledger if args.ledger else export_corpus)(args.path, args.out)


def _data_import(args: argparse.Namespace) -> None:
    from mobillama.workflows.corpus import import_corpus

    import_corpus(args.path, args.tokenizer, args.out)


def _trace(args: argparse.Namespace) -> None:
    from mobillama.workflows.tracing import show_trace

    show_trace(args.path, args.text, args.limit, args.seed, args.batch_size, args.epochs, args.json)
