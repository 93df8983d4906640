"""Opening a deployed model: its engine and its tokenizer. Each engine's libraries are imported only when it is chosen."""

from __future__ import annotations

from pathlib import Path

from mobillama.data.tokenizer import JSON_FILE, Tokenizer, load_tokenizer
from mobillama.engine.interface import Engine
from mobillama.errors import UsageError

TORCH, ONNXRUNTIME = "torch", "onnxruntime"
ENGINES = (TORCH, ONNXRUNTIME)
GRAPH_FILE = "model.onnx"


def engine_for(path: Path) -> str:
    """Return the engine that a file or directory was made for.

    Raises:
        UsageError: there is nothing at ``path``.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory; give a model directory or an exported file")
    return ONNXRUNTIME if path.suffix == ".onnx" or (path / GRAPH_FILE).is_file() else TORCH


def load_engine(path: Path, engine: str = "auto", threads: int = 0) -> tuple[Engine, Tokenizer]:
    """Return the engine and tokenizer of a model.

    Args:
        path: a model directory, or what ``mobillama export`` made.
        engine: one of ``ENGINES``; auto: the one that ``path`` was made for.
        threads: to compute with; 0: what the engine takes by itself, all cores as a rule.

    Raises:
        UsageError: there is no model, the engine cannot open it, or its tokenizer is missing or has another vocabulary.
        CorruptDataError: it is damaged.
    """
    opened = _open(path, engine_for(path) if engine == "auto" else engine, threads)
    directory = path if path.is_dir() else path.parent
    if not (directory / JSON_FILE).is_file():
        raise UsageError(f"{directory}: no {JSON_FILE} there; copy the model's tokenizer beside its weights")
    tokenizer = load_tokenizer(directory / JSON_FILE)
    if tokenizer.vocab_size != opened.vocab_size:
        raise UsageError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model {opened.vocab_size}; "
            "put the model's own tokenizer beside it"
        )
    return opened, tokenizer


def _open(path: Path, engine: str, threads: int) -> Engine:
    if engine == ONNXRUNTIME:
        from mobillama.engine.onnx_engine import OnnxEngine

        return OnnxEngine.load(path, threads)
    from mobillama.engine.torch_engine import TorchEngine

    if path.suffix == ".onnx":
        raise UsageError(f"{path}: torch cannot open it; leave --engine out, or give the directory it was exported from")
    return TorchEngine.load(path, threads=threads)
