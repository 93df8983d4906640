"""Verbs that use a model: generate, chat, serve."""

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
    from mobillama.serve.served import Served


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    verb = add_verb(verbs, "generate", _generate, "continue a text")
    _add_model(verb)
    verb.add_argument("--prompt", required=True, help="the text to continue")
    _add_sampling(verb, max_tokens=200)

    verb = add_verb(verbs, "chat", _chat, "talk to a model in the terminal, in the chat template that came with it")
    _add_model(verb)
    verb.add_argument("--system", default="", help="what the model is told first (default: what its template says)")
    _add_sampling(verb, max_tokens=512)

    verb = add_verb(verbs, "serve", _serve, "serve a model over HTTP: OpenAI's API and a page to talk to it")
    _add_model(verb)
    verb.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    verb.add_argument("--port", type=at_least(0), default=8000, help="0: any that is free (default: %(default)s)")
    verb.add_argument(
        "--name", default="", help="what clients call the model (default: the file's or directory's name)"
    )
    verb.add_argument("--slots", type=at_least(1), default=8, help="requests decoded together (default: %(default)s)")
    verb.add_argument(
        "--queue", type=at_least(0), default=64, help="requests that may wait for a slot (default: %(default)s)"
    )
    verb.add_argument(
        "--token-file", type=Path, help="holds a secret that clients must send; needed to listen beyond this machine"
    )
    verb.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that clients call it by"
    )
    verb.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site whose pages may call it (default: none)",
    )
    verb.add_argument("--run", type=Path, metavar="DIR", help="a run directory that the page reports on")


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, help="a GGUF file, a model directory, or what 'mobillama export onnx' made")
    verb.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="what computes (default: the best that opens the model here)",
    )
    verb.add_argument("--threads", type=at_least(1), default=0, help="to compute with (default: all cores)")
    verb.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where torch sees one"
    )
    verb.add_argument(
        "--context",
        type=at_least(1),
        default=0,
        help="tokens that a text and its continuation have room for (default: what the model was made for)",
    )


def _add_sampling(verb: argparse.ArgumentParser, max_tokens: int) -> None:
    verb.add_argument("--max-tokens", type=int, default=max_tokens, help="longest answer (default: %(default)s)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    verb.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all (default: %(default)s)")
    verb.add_argument("--top-p", type=float, default=0.95, help="draw among this share (default: %(default)s)")
    verb.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="draw among tokens at least this share as likely as the likeliest; 0: all (default: %(default)s)",
    )
    verb.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: make tokens rarer that were there before (default: %(default)s)",
    )
    verb.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    verb.add_argument(
        "--lookup",
        type=at_least(0),
        default=0,
        metavar="N",
        help="guess up to N tokens at a time from where the last ones stood before: the same text, sooner where it repeats "
        "itself; 8 is a good number on a CPU (default: 0, guess nothing)",
    )


def _sampling(args: argparse.Namespace) -> Sampling:
    from mobillama.engine.sampling import Sampling

    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens: {args.max_tokens} is not a positive number")
    if args.seed < 0:
        raise UsageError(f"--seed: {args.seed} is negative")
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)


def _generate(args: argparse.Namespace) -> None:
    import numpy as np

    from mobillama.engine.load import load_engine
    from mobillama.engine.stream import Session, stream_tokens, text_of

    sampling = _sampling(args)
    engine, tokenizer = load_engine(args.model, args.engine, args.threads, args.device, args.context)
    prompt = args.prompt.encode("utf-8", errors="replace").decode()  # bytes that are no UTF-8 become question marks
    (ids,) = tokenizer.encode([prompt])
    if not ids:
        raise UsageError("--prompt: is empty; give at least a character")
    if len(ids) >= engine.context_length:
        raise UsageError(
            f"--prompt: {len(ids)} tokens leave no room in a context of {engine.context_length}; shorten it"
        )
    random = np.random.default_rng(args.seed)
    tokens = stream_tokens(Session(engine), ids, {tokenizer.eos_id}, sampling, args.max_tokens, random, args.lookup)
    print(prompt, end="", flush=True)
    for piece in text_of(tokens, tokenizer):
        print(piece, end="", flush=True)
    print()


def _chat(args: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 line editing and history at the prompt

    from rich.console import Console

    from mobillama.engine.load import load_engine
    from mobillama.serve.chat import Conversation, chat

    sampling, console = _sampling(args), Console(highlight=False)
    with console.status("loading the model …"):
        engine, tokenizer = load_engine(args.model, args.engine, args.threads, args.device, args.context)
        conversation = Conversation(engine, tokenizer, sampling, args.max_tokens, args.seed, args.system, args.lookup)
    chat(
        conversation,
        read=lambda: console.input("[bold cyan]> [/]"),
        write=lambda text: console.out(text, end=""),
        note=lambda text: console.print(text, style="dim", markup=False),
    )


def _serve(args: argparse.Namespace) -> None:
    from mobillama.engine.load import engine_for
    from mobillama.serve.served import open_served
    from mobillama.serve.server import Listen, serve

    engine_for(args.model, args.engine, args.device)  # what is wrong with the path is told before anything listens
    if args.run is not None and not (args.run / "metrics.jsonl").is_file():
        raise UsageError(f"--run: {args.run} holds no metrics.jsonl, so it is no run directory")
    listen = Listen(args.host, args.port, _token(args.token_file), args.allow_host, args.allow_origin)

    def load() -> Served:
        return open_served(args.model, args.name, args.slots, args.engine, args.threads, args.device, args.context)

    serve(listen, load, args.queue, args.run, lambda text: print(f"mobillama: {text}", flush=True))


def _token(file: Path | None) -> str:
    if file is None:
        return ""
    if not file.is_file():
        raise UsageError(f"--token-file: {file}: no such file")
    return file.read_text(encoding="utf-8", errors="replace").strip()
