"""Verbs that bring models in and out: import, export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobillama.cli.verbs import add_group, add_verb, at_least, new_file, new_path

if TYPE_CHECKING:
    from mobillama.cli.verbs import Verbs

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    verb = add_verb(verbs, "import", _import, "make a model directory of a model from elsewhere")
    verb.add_argument(
        "source", type=Path, help="a Llama's Hugging Face directory (official checkpoints too) or GGUF file"
    )
    verb.add_argument("out", type=new_path, help="the model directory to make")
    verb.add_argument("--unshared", action="store_true", help="keep every layer's own copy of what layers share")
    verb.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as stored; for GGUF the narrowest that keeps every bit)",
    )

    group = add_group(verbs, "export", "write a model for other tools")
    verb = add_verb(group, "hf", _export_hf, "a Hugging Face directory, checked against the original")
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/) or a GGUF file")
    verb.add_argument("out", type=new_path, help="the directory to make")
    verb.add_argument("--unshared", action="store_true", help="a plain Llama that loads without mobillama installed")

    verb = add_verb(group, "gguf", _export_gguf, "a GGUF file, checked against the original")
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/) or a GGUF file")
    verb.add_argument("out", type=new_file, help="the file to make; the check's figures go to OUT.json")
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--shared", action="store_true", help="what layers share once (default if they share anything)")
    form.add_argument(
        "--unshared", action="store_true", help="with copies of it, for stock llama.cpp, Ollama, LM Studio"
    )
    verb.add_argument(
        "--type",
        choices=GGUF_TYPES,
        help="of matrices; 4-bit types get a q8_0 head (default: f16, or as a GGUF file has them)",
    )

    verb = add_verb(group, "onnx", _export_onnx, "a directory for ONNX Runtime, checked against the original")
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/) or a GGUF file")
    verb.add_argument(
        "out", type=new_path, help="the directory to make: graph, weights, tokenizer, the check's figures"
    )
    verb.add_argument(
        "--type", choices=("q4_0", "q8_0"), help="of matrices (default: as a GGUF file has them; a directory's: q4_0)"
    )
    verb.add_argument(
        "--head", choices=("q4_0", "q8_0"), help="of the head (default: as a GGUF file has it; else q8_0)"
    )
    verb.add_argument(
        "--context",
        type=at_least(2),
        help="tokens that the cache has places for (default: what the model was made for)",
    )
    verb.add_argument(
        "--cache",
        choices=("int8", "float32"),
        default="int8",
        help="keys and values while decoding (default: %(default)s)",
    )
    verb.add_argument(
        "--activations",
        choices=("int8", "float32"),
        default="int8",
        help="what products compute in; float32 is exact and slow (default: %(default)s)",
    )

    verb = add_verb(group, "executorch", _export_executorch, "a program for ExecuTorch, checked against the original")
    verb.add_argument("model", type=Path, help="a model directory (a checkpoint's model/) or a GGUF file")
    verb.add_argument(
        "out",
        type=new_file,
        help="the .pte file to make; the check's figures go to OUT.json, the tokenizer to OUT.tokenizer.model or .json",
    )
    verb.add_argument(
        "--type",
        choices=("8da4w", "float32"),
        default="8da4w",
        help="of matrices: 4 bits in groups of 32, multiplied with activations of 8 bits, the head in 8 bits; or "
        "float32, exact and large (default: %(default)s)",
    )
    verb.add_argument(
        "--context",
        type=at_least(2),
        help="tokens that the cache, in float32, has places for (default: what the model was made for)",
    )


def _import(args: argparse.Namespace) -> None:
    from mobillama.console import note, progress
    from mobillama.importing.models import DTYPES, import_model

    with progress() as show:
        facts = import_model(args.source, args.out, DTYPES.get(args.dtype), args.unshared, show)
    for line in facts["notes"]:
        note(line)
    print(args.out)


def _export_hf(args: argparse.Namespace) -> None:
    from mobillama.console import progress
    from mobillama.deploy.hf import export_hf

    with progress() as show:
        _print(args.out, export_hf(args.model, args.out, args.unshared, show))


def _export_gguf(args: argparse.Namespace) -> None:
    from mobillama.console import progress
    from mobillama.deploy.gguf import export_gguf
    from mobillama.engine.blocks import TYPES

    shared = True if args.shared else False if args.unshared else None
    with progress() as show:
        facts = export_gguf(args.model, args.out, TYPES[args.type] if args.type else None, shared, show=show)
    _print(args.out, facts)


def _export_onnx(args: argparse.Namespace) -> None:
    from mobillama.console import progress
    from mobillama.deploy.onnx import export_onnx
    from mobillama.engine.blocks import TYPES

    kind, head = (TYPES[name] if name else None for name in (args.type, args.head))
    with progress() as show:
        facts = export_onnx(
            args.model,
            args.out,
            kind,
            head,
            int8_cache=args.cache == "int8",
            int8_activations=args.activations == "int8",
            context=args.context,
            show=show,
        )
    _print(args.out, facts)


def _export_executorch(args: argparse.Namespace) -> None:
    from mobillama.console import progress
    from mobillama.deploy.executorch import export_executorch

    with progress() as show:
        facts = export_executorch(args.model, args.out, args.type, args.context, show=show)
    _print(args.out, facts)


def _print(out: Path, facts: dict[str, Any]) -> None:
    from mobillama.console import note
    from mobillama.deploy.parity import Parity

    note(f"{out}: {facts['bytes'] / 1e6:,.1f} MB · {Parity(**facts['parity'])}")
    print(json.dumps({"out": str(out), **facts}))
