"""Opening a deployed model: its engine and its tokenizer. Each engine's libraries are imported only when it is chosen."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mobillama.data.tokenizer import JSON_FILE, Tokenizer, load_tokenizer
from mobillama.engine import NATIVE, ONNXRUNTIME, TORCH
from mobillama.engine.gguf import is_gguf, read_gguf
from mobillama.engine.interface import BatchEngine, Engine, OneSlot, chosen_context
from mobillama.engine.weights import check_vocabulary
from mobillama.errors import UsageError
from mobillama.record.environment import available_cores

if TYPE_CHECKING:
    from mobillama.model.transformer import MobiLlama

GRAPH_FILE = "model.onnx"


def engines_for(path: Path) -> tuple[str, ...]:
    """Return the names of the engines that open a file or directory, best first.

    Raises:
        UsageError: there is nothing at ``path``, or no model.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory; give a GGUF file or a model directory")
    if _holds_graph(path):
        return (ONNXRUNTIME,)
    if is_gguf(path):
        return NATIVE, TORCH
    if not path.is_dir():
        raise UsageError(f"{path}: is neither a GGUF file nor a model directory")
    return (TORCH,)


def engine_for(path: Path, engine: str = "auto", device: str = "auto") -> str:
    """Return the name of the engine to open a file or directory with.

    Args:
        path: see :func:`load_engine`, as the others.
        engine: a name, which is returned if it can open ``path``; auto: the best that is to be had here. Where the native
            one cannot be built, one line says so.
        device: cuda: torch, where it can open ``path``.

    Raises:
        UsageError: there is nothing at ``path``, or ``engine`` cannot open it.
    """
    able = engines_for(path)
    if engine != "auto":
        if engine not in able:
            remedy = f"run mobillama export gguf {path} FILE.gguf" if engine == NATIVE else "export it anew"
            raise UsageError(
                f"{path}: was made for {able[0]}, {engine} cannot open it; leave --engine out, or {remedy}"
            )
        return engine
    if able[0] == NATIVE and (device == "cuda" or not _native_is_built(path)):
        return able[1]
    return able[0]


def check_threads(threads: int) -> None:
    """Refuse more threads than cores: they would wait for one another.

    Raises:
        UsageError: there are fewer cores.
    """
    if threads > (cores := available_cores()):
        raise UsageError(f"--threads: {threads} where there are {cores} cores; take at most as many")


def _native_is_built(path: Path) -> bool:
    from mobillama.native.build import CannotBuild
    from mobillama.native.library import library

    try:
        library()
    except CannotBuild as error:
        if find_spec("torch") is None:
            raise UsageError(f"{path}: {error}; or decode with torch: pip install 'mobillama[train]'") from None
        print(f"mobillama: {error}; torch decodes instead", file=sys.stderr)
        return False
    return True


def load_engine(
    path: Path, engine: str = "auto", threads: int = 0, device: str = "auto", context_length: int = 0
) -> tuple[Engine, Tokenizer]:
    """Return the engine and tokenizer of a model.

    Args:
        path: a model directory, or what ``mobillama export`` made: a GGUF file, or a directory with an ONNX graph.
        engine: one of ``mobillama.engine.ENGINES``; auto: see :func:`engine_for`.
        threads: to compute with; 0: what the engine takes by itself, all cores as a rule.
        device: cpu, cuda, or auto: a GPU where torch sees one.
        context_length: tokens to make room for; 0: what the model was made for.

    Raises:
        UsageError: there is no model, the engine cannot open it, there are fewer cores than ``threads`` or no such device,
            ``context_length`` is more than the model was made for or fits no memory, or its tokenizer is missing or has
            another vocabulary.
        CorruptDataError: it is damaged.
    """
    opened = open_engine(path, engine, threads, device, context_length)
    return opened, _matching_tokenizer(path, opened.vocab_size)


def load_batch_engine(
    path: Path, slots: int, engine: str = "auto", threads: int = 0, device: str = "auto", context_length: int = 0
) -> tuple[BatchEngine, Tokenizer]:
    """Return an engine of several slots and the tokenizer of a model.

    Args:
        path: see :func:`load_engine`, as the others.
        slots: sequences decoded together; engines that decode one sequence have one.
        engine: see :func:`load_engine`.
        threads: to compute with.
        device: to compute on.
        context_length: tokens that a slot holds.

    Raises:
        UsageError: see :func:`load_engine`.
        CorruptDataError: it is damaged.
    """
    opened = open_batch_engine(path, slots, engine, threads, device, context_length)
    return opened, _matching_tokenizer(path, opened.vocab_size)


def _matching_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    tokenizer = tokenizer_of(path)
    check_vocabulary(path, tokenizer.vocab_size, vocab_size, exact=True)
    return tokenizer


def open_engine(
    path: Path, engine: str = "auto", threads: int = 0, device: str = "auto", context_length: int = 0
) -> Engine:
    """Return the engine of a file or directory; arguments and errors are those of :func:`load_engine`."""
    check_threads(threads)
    chosen_engine = engine_for(path, engine, device)
    _check_device(path, chosen_engine, device)
    if chosen_engine == ONNXRUNTIME:
        if context_length:
            raise UsageError(f"--context: {chosen_engine} holds as many tokens as it was exported for; leave it out")
        from mobillama.engine.onnx_engine import OnnxEngine

        return OnnxEngine.load(path, threads)
    if chosen_engine == NATIVE:
        from mobillama.engine.native_engine import NativeEngine

        return NativeEngine.load(path, threads, context_length)
    from mobillama.engine.torch_engine import TorchEngine

    model = _torch_model(path, threads, device)
    return TorchEngine(model, chosen_context(path, context_length, model.model.shape.max_position_embeddings))


def open_batch_engine(
    path: Path, slots: int, engine: str = "auto", threads: int = 0, device: str = "auto", context_length: int = 0
) -> BatchEngine:
    """Return the engine of several slots of a file or directory; arguments and errors are those of
    :func:`load_batch_engine`.
    """
    chosen = engine_for(path, engine, device)
    if chosen not in (NATIVE, TORCH):
        return OneSlot(open_engine(path, engine, threads, device, context_length))
    check_threads(threads)
    if chosen == NATIVE:
        _check_device(path, chosen, device)
        from mobillama.engine.native_engine import NativeBatchEngine

        return NativeBatchEngine.load(path, slots, threads, context_length)
    from mobillama.engine.torch_batch import TorchBatchEngine

    model = _torch_model(path, threads, device)
    most = model.model.shape.max_position_embeddings
    return TorchBatchEngine(model, slots, chosen_context(path, context_length, most))


def check_gpu(device: str) -> None:
    """Refuse ``cuda`` where torch sees no GPU.

    Raises:
        UsageError: it sees none.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device: cuda is asked for, but torch sees no GPU here; leave it out")


def _check_device(path: Path, engine: str, device: str) -> None:
    if engine != TORCH and device == "cuda":
        raise UsageError(f"{path}: {engine} computes on the CPU here; leave --device out")


def _torch_model(path: Path, threads: int, device: str) -> MobiLlama:
    import torch

    if threads:
        torch.set_num_threads(threads)
    check_gpu(device)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if path.is_dir():
        from mobillama.directory import load_model

        return load_model(path, device=chosen)
    from mobillama.engine.torch_gguf import load_gguf

    return load_gguf(path)[0].to(chosen)


def tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer of a model file or directory.

    Raises:
        UsageError: it has none.
        CorruptDataError: it is damaged.
    """
    if is_gguf(path):
        from mobillama.engine.gguf_model import read_tokenizer

        return read_tokenizer(read_gguf(path))
    directory = path if path.is_dir() else path.parent
    if not (directory / JSON_FILE).is_file():
        raise UsageError(f"{directory}: no {JSON_FILE} there; copy the model's tokenizer beside its weights")
    return load_tokenizer(directory / JSON_FILE)


def _holds_graph(path: Path) -> bool:
    return path.suffix == ".onnx" or (path / GRAPH_FILE).is_file()
