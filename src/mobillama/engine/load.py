"""Opening a deployed model: its engine and its tokenizer. Each engine's libraries are imported only when it is chosen."""

from __future__ import annotations

from pathlib import Path

from mobillama.data.tokenizer import JSON_FILE, Tokenizer, load_tokenizer
from mobillama.engine import ONNXRUNTIME, TORCH
from mobillama.engine.interface import Engine
from mobillama.errors import UsageError

GRAPH_FILE = "model.onnx"


def engine_for(path: Path) -> str:
    """Return the name of the engine that a file or directory was made for.

    Raises:
        UsageError: there is nothing at ``path``.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory; give a model directory or an exported file")
    return ONNXRUNTIME if _holds_graph(path) else TORCH


def load_engine(path: Path, engine: str = "auto", threads: int = 0, device: str = "auto") -> tuple[Engine, Tokenizer]:
    """Return the engine and tokenizer of a model.

    Args:
        path: a model directory, or what ``mobillama export`` made: a GGUF file, or a directory with an ONNX graph.
        engine: one of ``mobillama.engine.ENGINES``; auto: the one that ``path`` was made for.
        threads: to compute with; 0: what the engine takes by itself, all cores as a rule.
        device: cpu, cuda, or auto: a GPU where torch sees one.

    Raises:
        UsageError: there is no model, the engine cannot open it, or its tokenizer is missing or has another vocabulary.
        CorruptDataError: it is damaged.
    """
    made_for = engine_for(path)
    if engine not in ("auto", made_for):
        raise UsageError(
            f"{path}: was made for {made_for}, {engine} cannot open it; leave --engine out, or export it anew"
        )
    opened = open_engine(path, threads, device)
    tokenizer = _tokenizer_of(path)
    if tokenizer.vocab_size != opened.vocab_size:
        raise UsageError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {opened.vocab_size}; "
            "put the model's own tokenizer beside it"
        )
    return opened, tokenizer


def open_engine(path: Path, threads: int = 0, device: str = "auto") -> Engine:
    """Return the engine that a file or directory was made for; arguments and errors are those of :func:`load_engine`."""
    if engine_for(path) == ONNXRUNTIME:
        from mobillama.engine.onnx_engine import OnnxEngine

        if device == "cuda":
            raise UsageError(f"{path}: ONNX Runtime computes on the CPU here; leave --device out")
        return OnnxEngine.load(path, threads)
    import torch

    from mobillama.engine.torch_engine import TorchEngine

    if threads:
        torch.set_num_threads(threads)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if path.is_dir():
        return TorchEngine.from_directory(path, chosen)
    from mobillama.engine.torch_gguf import load_gguf

    return TorchEngine(load_gguf(path)[0].to(chosen))


def _tokenizer_of(path: Path) -> Tokenizer:
    if path.suffix == ".gguf":
        from mobillama.engine.gguf import read_gguf
        from mobillama.engine.gguf_model import read_tokenizer

        return read_tokenizer(read_gguf(path))
    directory = path if path.is_dir() else path.parent
    if not (directory / JSON_FILE).is_file():
        raise UsageError(f"{directory}: no {JSON_FILE} there; copy the model's tokenizer beside its weights")
    return load_tokenizer(directory / JSON_FILE)


def _holds_graph(path: Path) -> bool:
    return path.suffix == ".onnx" or (path / GRAPH_FILE).is_file()
