"""The model directory: config.json, model.safetensors, tokenizer. Read and written without importing transformers.

It is a complete Hugging Face directory: ``AutoModelForCausalLM`` loads it after ``import mobillama.hf``, or with
``trust_remote_code=True`` through the stub that it carries. Weights are stored once; nothing in it is a pickle.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mobillama.data.tokenizer import Tokenizer, save_tokenizer
from mobillama.engine.gguf_model import stored_names
from mobillama.engine.weights import check_layers, check_weights, weight_shape
from mobillama.errors import CorruptDataError, UsageError, cause
from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig
from mobillama.record.files import read_json, write_json, write_text
from mobillama.record.manifest import MANIFEST_NAME, read_manifest, verify_manifest

MODEL_TYPE = "mobillama"
CHECKPOINT_FORMAT = "mobillama-checkpoint-1"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STUB_FILE = "modeling_mobillama.py"
AUTO_MAP = {
    "AutoConfig": "modeling_mobillama.MobiLlamaConfig",
    "AutoModelForCausalLM": "modeling_mobillama.MobiLlamaForCausalLM",
}
STUB = '''"""Loads MobiLlama from the installed package: pip install "mobillama[hf]"."""

from mobillama.hf import MobiLlamaConfig, MobiLlamaForCausalLM

__all__ = ["MobiLlamaConfig", "MobiLlamaForCausalLM"]
'''


def config_json(config: ModelConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json: the model's shape under Hugging Face's names, and the special ids."""
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MobiLlamaForCausalLM"],
        "auto_map": AUTO_MAP,
        **asdict(config),
        **special,
        "dtype": str(dtype).removeprefix("torch."),
    }


def save_model(directory: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Write a model directory (not atomically: callers write into a temporary one and rename it).

    Args:
        weights: the state dict of :class:`MobiLlama`; each tensor is stored once.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(weights.values())).dtype
    write_json(directory / CONFIG_FILE, config_json(config, tokenizer, dtype))
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    write_json(directory / "generation_config.json", {"do_sample": True, **special})
    write_text(directory / STUB_FILE, STUB)
    save_tensors(directory / WEIGHTS_FILE, weights)
    if tokenizer:
        save_tokenizer(tokenizer, directory)


def read_config(directory: Path) -> ModelConfig:
    """Return the shape that a model directory states.

    Raises:
        UsageError: this is no directory of a MobiLlama model.
        CorruptDataError: config.json is damaged.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        models = sorted([*directory.glob("checkpoints/step-*/model"), *directory.glob("model")])
        hint = f"; did you mean {models[-1]}?" if models else ""
        if not directory.exists():
            raise UsageError(f"{directory}: no such directory; 'mobillama import' makes one of another project's model")
        if directory.is_file():
            hint = f"; make one of a file with 'mobillama import {directory} OUT'"
        raise UsageError(f"{directory}: no {CONFIG_FILE} there, so this is no model directory{hint}")
    stated = read_json(path)
    if stated.get("model_type") != MODEL_TYPE:
        raise UsageError(
            f"{path}: model_type is {str(stated.get('model_type'))[:40]!r}, not '{MODEL_TYPE}'; make a model directory of a "
            f"Llama with 'mobillama import {directory} OUT'"
        )
    names = {item.name for item in fields(ModelConfig)}
    settings = {name: value for name, value in stated.items() if name in names}
    kinds = get_type_hints(ModelConfig)
    if wrong := next((name for name, value in settings.items() if not _fits(value, kinds[name])), None):
        raise CorruptDataError(f"{path}: {wrong} is {str(settings[wrong])[:40]!r}; restore it from a copy")
    try:
        return ModelConfig(**settings)
    except (TypeError, UsageError) as error:
        raise CorruptDataError(f"{path}: states no possible model ({error}); restore it from a copy") from None


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value of JSON is of a field's type."""
    if get_origin(kind) is Union:
        return value is None or _fits(value, get_args(kind)[0])
    if kind not in (int, float):
        return isinstance(value, kind) if isinstance(kind, type) else value in get_args(kind)
    return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write floating-point tensors as a safetensors file, made durable; equal tensors give equal bytes.

    Unlike safetensors' own writer, it holds no second copy, and lets other threads run meanwhile: checkpoints are written
    beside training.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    # The widest types first, so that every tensor stands at a multiple of its own width, as readers expect.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind = _SAFETENSORS_TYPES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_all(file, tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK = 1 << 26


def _write_all(file: io.RawIOBase | io.FileIO, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left[:_BLOCK]) :]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CorruptDataError: it is missing, truncated or damaged.
    """
    with _told(path):
        return load_file(path)


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the header of a safetensors file states, which are held to the file's size.

    Raises:
        CorruptDataError: it is missing, truncated or damaged.
    """
    with _told(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 no mapping


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CorruptDataError(f"{path}: missing; restore it from a copy") from None
    except (SafetensorError, OSError) as error:
        raise CorruptDataError(f"{path}: damaged or truncated ({cause(error)}); restore it from a copy") from None


def verify_in_checkpoint(directory: Path) -> None:
    """Hash the files of a checkpoint's model directory against the checkpoint's manifest, where there is one."""
    checkpoint, name = directory.resolve().parent, directory.resolve().name
    manifest = checkpoint / MANIFEST_NAME
    if manifest.is_file() and read_json(manifest).get("format") == CHECKPOINT_FORMAT:
        verify_manifest(checkpoint, read_manifest(checkpoint, CHECKPOINT_FORMAT), f"{name}/")


def load_model(directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> MobiLlama:
    """Return the model of a directory, in evaluation mode.

    Args:
        dtype: type of the weights; absent: as stored.

    Raises:
        UsageError: this is no directory of a MobiLlama model.
        CorruptDataError: its weights are damaged, do not fit its config, or differ from its checkpoint's manifest.
    """
    config = read_config(directory)
    verify_in_checkpoint(directory)
    path = directory / WEIGHTS_FILE
    _check_fit(path, config)
    with torch.device("meta"):
        model = MobiLlama(config)
    model.load_state_dict(read_weights(path), assign=True)
    return model.to(device=device, dtype=dtype).eval()


def _check_fit(path: Path, config: ModelConfig) -> None:
    """Hold the file's header to the config before anything is made of either."""
    found = weight_shapes(path)
    check_layers(path.with_name(CONFIG_FILE), config.num_hidden_layers, config.share, len(found))
    wanted = {name: weight_shape(name, config) for name in stored_names(config).values()}
    check_weights(path, wanted, found)
    if unknown := sorted(found.keys() - wanted.keys()):
        raise CorruptDataError(f"{path}: '{unknown[0]}' has no place in the model of {CONFIG_FILE}; restore both")
