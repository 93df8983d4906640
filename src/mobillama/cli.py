"""The command line: parse, call one function, print. Each verb imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobillama import __version__
from mobillama.errors import MobiLlamaError, UsageError

if TYPE_CHECKING:
    from mobillama.engine.sampling import Sampling

    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = (
    "exit codes: 0 done · 2 wrong use or config · 3 verification failed · 4 data corrupt · 5 diverged · "
    "75 stopped, run me again to resume · 130/143 killed by the user"
)

# Which extra brings a package that the core install lacks.
EXTRA_OF_PACKAGE = {"torch": "train", "sentencepiece": "train", "matplotlib": "train", "transformers": "hf"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(words)
    try:
        if rest and not getattr(known, "takes_overrides", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        known.overrides = rest
        known.perform(known)
        return 0
    except MobiLlamaError as error:
        print(f"mobillama: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA_OF_PACKAGE:
            raise
        print(f"mobillama: needs {package}: pip install 'mobillama[{EXTRA_OF_PACKAGE[package]}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"mobillama: {place}{error.strerror or error}; check the path, its permissions and free space",
            file=sys.stderr,
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mobillama",
        description="Train, inspect and run small language models whose layers share one feed-forward network.",
        epilog=f"New here? 'mobillama quickstart' does the whole journey offline in minutes.\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mobillama {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = _verb(verbs, "quickstart", _quickstart, "train, evaluate, export and sample a small model, offline")
    verb.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="run directory (default: %(default)s)")
    verb.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")

    verb = _verb(verbs, "presets", _presets, "list the model shapes with parameters, arithmetic and memory")
    verb.add_argument("--json", action="store_true", help="print JSON")

    group = _group(verbs, "tokenizer", "train a tokenizer")
    verb = _verb(group, "train", _tokenizer_train, "train a LLaMA-type BPE with byte fallback")
    verb.add_argument("texts", type=Path, nargs="+", help="JSON lines (.jsonl .gz .xz), .txt, or directories of them")
    verb.add_argument("--vocab-size", type=int, default=32000, help="number of ids (default: %(default)s, the paper's)")
    verb.add_argument("--out", type=Path, required=True, help="the .model file to write")

    group = _group(verbs, "data", "prepare training data and look into it")
    verb = _verb(group, "prepare", _data_prepare, "turn raw documents into ordered sequences", overrides=True)
    verb.add_argument("recipe", type=Path, help="a preparation recipe (YAML)")
    verb.add_argument("--out", type=Path, required=True, help="the data directory to make")
    verb = _verb(group, "show", _data_show, "show what a training step learns from: text, source, documents")
    verb.add_argument("path", type=Path, help="a run directory, or a prepared data directory")
    verb.add_argument("--step", type=int, required=True, help="which step, counted from 1 as in metrics.jsonl")
    verb.add_argument("--batch-size", type=int, help="sequences in a step (a run knows its own)")
    verb.add_argument("--seed", type=int, help="seed of the order (a run knows its own; default: the prepared seed)")
    verb.add_argument(
        "--characters", type=int, default=300, help="of each sequence's text; 0: all (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="print a JSON object a line, with ids")

    verb = _verb(verbs, "pretrain", _pretrain, "pre-train a model; the same command resumes a run", overrides=True)
    verb.add_argument("recipe", type=Path, help="a pre-training recipe (YAML)")
    verb.add_argument("--print-config", action="store_true", help="print the resolved recipe and leave")

    verb = _verb(verbs, "evaluate", _evaluate, "bits per byte on the hold-out")
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/)")
    verb.add_argument("--data", type=Path, required=True, help="the prepared data directory")
    verb.add_argument("--limit", type=int, default=0, help="held-out sequences per source (default: all)")
    verb.add_argument("--baselines", action="store_true", help="compressors and n-gram models beside it")
    verb.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    verb.add_argument("--json", action="store_true", help="print JSON")

    group = _group(verbs, "export", "write a model for other tools")
    verb = _verb(group, "hf", _export_hf, "a Hugging Face directory, checked against the original")
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/)")
    verb.add_argument("out", type=Path, help="the directory to make")
    verb.add_argument("--unshared", action="store_true", help="a plain Llama that loads without mobillama installed")

    verb = _verb(verbs, "generate", _generate, "continue a text")
    verb.add_argument("model", type=Path, help="a model directory")
    verb.add_argument("--prompt", required=True, help="the text to continue")
    _add_sampling(verb)

    verb = _verb(verbs, "chat", _chat, "talk to a model in the terminal")
    verb.add_argument("model", type=Path, help="a model directory")
    _add_sampling(verb)
    return parser


def _verb(
    verbs: _Verbs, name: str, perform: Callable[[argparse.Namespace], None], summary: str, overrides: bool = False
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXIT_CODES,
        allow_abbrev=False,
        add_help=not overrides,
    )
    if overrides:
        verb.add_argument("-h", "--help", action=_RecipeHelp, verb=name)
    verb.set_defaults(perform=perform, takes_overrides=overrides)
    return verb


def _group(verbs: _Verbs, name: str, summary: str) -> _Verbs:
    parser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)


class _RecipeHelp(argparse.Action):
    """``--help`` of a verb with a recipe: the verb's own options, then every key of the recipe."""

    def __init__(self, option_strings: Sequence[str], dest: str, verb: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this help and every key of the recipe")
        self.verb = verb

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from mobillama.config import recipe_parser
        from mobillama.recipe import PRESETS, PrepareRecipe, PretrainRecipe

        parser.print_help()
        print("\nKeys of the recipe; each can be overridden as --key value:\n")
        print(recipe_parser(PretrainRecipe if self.verb == "pretrain" else PrepareRecipe, parser.prog).format_help())
        if self.verb == "pretrain":
            print(f"model.preset is one of: {', '.join(PRESETS)}")
        parser.exit()


def _add_sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-tokens", type=int, default=200, help="longest answer (default: %(default)s)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    verb.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all (default: %(default)s)")
    verb.add_argument("--top-p", type=float, default=0.95, help="draw among this share (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")


def _quickstart(args: argparse.Namespace) -> None:
    from mobillama.workflows.quickstart import quickstart

    quickstart(args.run, args.steps)


def _presets(args: argparse.Namespace) -> None:
    from mobillama.workflows.presets import preset_rows, show_presets

    if args.json:
        print(json.dumps(preset_rows(), indent=2))
    else:
        show_presets()


def _tokenizer_train(args: argparse.Namespace) -> None:
    from mobillama.console import note
    from mobillama.data.documents import read_texts
    from mobillama.data.tokenizer import train_tokenizer

    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(read_texts(args.texts), args.vocab_size, args.out)
    note(f"{args.out}: {tokenizer.vocab_size:,} ids")


def _data_prepare(args: argparse.Namespace) -> None:
    from mobillama.config import load_recipe
    from mobillama.console import progress
    from mobillama.data.prepare.pipeline import prepare
    from mobillama.recipe import PrepareRecipe
    from mobillama.workflows.inspect import show_preparation

    recipe = load_recipe(PrepareRecipe, args.recipe, args.overrides)
    with progress() as show:
        manifest = prepare(recipe, args.out, show)
    show_preparation(args.out, manifest)


def _data_show(args: argparse.Namespace) -> None:
    from mobillama.workflows.inspect import show_step

    show_step(args.path, args.step, args.batch_size, args.seed, args.characters, args.json)


def _pretrain(args: argparse.Namespace) -> None:
    from mobillama.config import load_recipe, to_yaml
    from mobillama.recipe import PretrainRecipe

    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides)
    if args.print_config:
        print(to_yaml(recipe), end="")
        return
    from mobillama.console import TrainingView, progress
    from mobillama.train.loop import pretrain

    with progress() as show:
        path = pretrain(recipe, TrainingView(show))
    print(path / "model")


def _evaluate(args: argparse.Namespace) -> None:
    from mobillama.workflows.inspect import show_heldout

    show_heldout(args.model, args.data, args.device, args.limit, args.baselines, args.json)


def _export_hf(args: argparse.Namespace) -> None:
    from mobillama.deploy.hf import export_hf

    parity = export_hf(args.model, args.out, args.unshared)
    print(json.dumps({"out": str(args.out), **parity}))


def _sampling(args: argparse.Namespace) -> Sampling:
    from mobillama.engine.sampling import Sampling

    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens: {args.max_tokens} is not a positive number")
    if args.seed < 0:
        raise UsageError(f"--seed: {args.seed} is negative")
    return Sampling(args.temperature, args.top_k, args.top_p)


def _generate(args: argparse.Namespace) -> None:
    import numpy as np

    from mobillama.engine.load import load_engine
    from mobillama.engine.stream import Session, stream_tokens, text_of

    sampling = _sampling(args)
    engine, tokenizer = load_engine(args.model)
    prompt = args.prompt.encode("utf-8", errors="replace").decode()  # bytes that are no UTF-8 become question marks
    (ids,) = tokenizer.encode([prompt])
    if not ids:
        raise UsageError("--prompt: is empty; give at least a character")
    if len(ids) >= engine.context_length:
        raise UsageError(
            f"--prompt: {len(ids)} tokens leave no room in a context of {engine.context_length}; shorten it"
        )
    random = np.random.default_rng(args.seed)
    tokens = stream_tokens(Session(engine), ids, tokenizer.eos_id, sampling, args.max_tokens, random)
    print(prompt, end="", flush=True)
    for piece in text_of(tokens, tokenizer):
        print(piece, end="", flush=True)
    print()


def _chat(args: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 line editing and history at the prompt

    from mobillama.engine.load import load_engine
    from mobillama.serve.chat import Conversation, chat

    sampling = _sampling(args)
    engine, tokenizer = load_engine(args.model)
    conversation = Conversation(engine, tokenizer, sampling, args.max_tokens, args.seed)
    chat(conversation, lambda: input("> "), lambda text: print(text, end="", flush=True))
