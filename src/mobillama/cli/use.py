"""Verbs that use a model: generate, chat."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from mobillama.cli.verbs import add_verb, at_least
from mobillama.engine import ENGINES
from mobillama.errors import UsageError

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs
    from mobillama.engine.sampling import Sampling


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    verb = add_verb(verbs, "generate", _generate, "continue a text")
    _add_model(verb)
    verb.add_argument("--prompt", required=True, help="the text to continue")
    _add_sampling(verb)

    verb = add_verb(verbs, "chat", _chat, "talk to a model in the terminal")
    _add_model(verb)
    _add_sampling(verb)


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, help="a model directory, or what 'mobillama export' made")
    verb.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="what computes (default: what the model was exported for)",
    )
    verb.add_argument("--threads", type=at_least(1), default=0, help="to compute with (default: all cores)")
    verb.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where torch sees one"
    )


def _add_sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-tokens", type=int, default=200, help="longest answer (default: %(default)s)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    verb.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all (default: %(default)s)")
    verb.add_argument("--top-p", type=float, default=0.95, help="draw among this share (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")


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
    engine, tokenizer = load_engine(args.model, args.engine, args.threads, args.device)
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
    engine, tokenizer = load_engine(args.model, args.engine, args.threads, args.device)
    conversation = Conversation(engine, tokenizer, sampling, args.max_tokens, args.seed)
    chat(conversation, lambda: input("> "), lambda text: print(text, end="", flush=True))
