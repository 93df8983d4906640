"""Models from elsewhere as model directories of this project: official checkpoints, Llama directories, GGUF files.

Official checkpoints (MBZUAI/MobiLlama-*) store the shared feed-forward network once per layer and state a number of
key/value heads that their weights contradict. Copies are compared and stored once, heads are counted from the weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobillama.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, load_tokenizer
from mobillama.directory import CONFIG_FILE, MODEL_TYPE, save_model
from mobillama.engine.gguf_model import read_model, stored_names
from mobillama.engine.torch_gguf import decode_weights
from mobillama.engine.weights import EMBEDDING, HEAD, check_layers, check_vocabulary, check_weights, weight_shape
from mobillama.errors import CorruptDataError, UsageError
from mobillama.importing.weight_files import WeightFiles
from mobillama.progress import Show, quiet
from mobillama.recipe import ModelConfig
from mobillama.record.files import new_directory, read_json, sha256_file, write_json

IMPORT_FILE = "import.json"
VERSION = 1  # one more whenever the same file comes to be read as another model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FFN_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Foreign:
    """A model that was read from elsewhere."""

    shape: ModelConfig
    weights: dict[str, Tensor]
    """By this project's names, each once."""
    tokenizer: Tokenizer
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    """What was found to be otherwise than stated."""


def import_model(
    source: Path, out: Path, dtype: torch.dtype | None = None, keep_copies: bool = False, show: Show = quiet
) -> dict[str, Any]:
    """Write a model directory from ``source``; what layers share is stored once.

    Args:
        source: a Hugging Face directory of a Llama (official MobiLlama checkpoints among them), or a GGUF file.
        out: the directory to make.
        dtype: type of the weights; absent: as stored, and the narrowest that keeps every bit of a GGUF file.
        keep_copies: store every layer's own copy, whether copies are equal or not.
        show: told the progress.

    Returns:
        What is also recorded in the directory's ``import.json``: shape, files read with their sha256, notes.

    Raises:
        UsageError: ``source`` is no such model, of a kind that is not known, or holds numbers that ``dtype`` does not reach.
        CorruptDataError: it is damaged, its parts contradict one another, or copies that are to be equal differ.
    """
    with new_directory(out) as work:
        if source.is_dir():
            foreign = read_directory(source, dtype, keep_copies, show)
        else:
            read = read_model(source, keep_copies)
            weights = decode_weights(read, None, lambda done, total: show("decode tensors", done, total))
            if dtype is not None:
                weights = {name: _cast(source, name, tensor, dtype) for name, tensor in weights.items()}
            foreign = Foreign(read.shape, weights, read.tokenizer, [source])
        _fit_vocabulary(foreign)
        show("write", 0, 1)
        save_model(work, foreign.shape, foreign.weights, foreign.tokenizer)
        show("write", 1, 1)
        facts = {
            "source": source.name or str(source),
            "share": foreign.shape.share,
            "dtype": str(foreign.weights[EMBEDDING].dtype).removeprefix("torch."),
            "stored_parameters": sum(tensor.numel() for tensor in foreign.weights.values()),
            "notes": foreign.notes,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in foreign.files},
        }
        write_json(work / IMPORT_FILE, facts)
    return facts


def _fit_vocabulary(foreign: Foreign) -> None:
    """Drop rows of embedding and head that no id of the tokenizer names (padding), or refuse a tokenizer that is too large."""
    ids, rows = foreign.tokenizer.vocab_size, foreign.shape.vocab_size
    check_vocabulary(foreign.tokenizer.path, ids, rows)
    if ids < rows:
        foreign.notes.append(
            f"{rows - ids:,} rows of the vocabulary, which no id of the tokenizer names, were left out"
        )
        foreign.shape = dataclasses.replace(foreign.shape, vocab_size=ids)
        for name in {EMBEDDING, HEAD} & foreign.weights.keys():
            foreign.weights[name] = foreign.weights[name][:ids]


def read_directory(source: Path, dtype: torch.dtype | None, keep_copies: bool, show: Show = quiet) -> Foreign:
    """Read a Hugging Face directory of a Llama.

    Raises:
        UsageError: it holds no such model, or one of a kind that is not known.
        CorruptDataError: it is damaged, or copies that are to be equal differ.
    """
    config = source / CONFIG_FILE
    if not config.is_file():
        raise UsageError(f"{source}: no {CONFIG_FILE} there; give the directory of a model, or a .gguf file")
    stated = read_json(config)
    _refuse_what_is_no_llama(config, stated)
    files = WeightFiles(source)
    notes: list[str] = []
    shape = _shape(config, stated, files, notes)
    _check_tensors(source, shape, files)
    if not keep_copies:
        # Only the official checkpoints bring code of their own, and in them all networks are one.
        shape = find_sharing(shape, files, "auto_map" in stated, source, show)
    weights = {}
    for number, name in enumerate(names := list(stored_names(shape).values()), 1):
        weights[name] = files[_origin(name, shape)]
        show("read tensors", number, len(names))
    types = {tensor.dtype for tensor in weights.values()}
    dtype = dtype or (types.pop() if len(types) == 1 and types <= set(DTYPES.values()) else torch.float32)
    weights = {name: _cast(source, name, tensor, dtype) for name, tensor in weights.items()}
    if shape.share != "none":
        copies = shape.num_hidden_layers - len({ffn for _, ffn in shape.layer_weights})
        what = "block" if shape.share == "block" else "feed-forward network"
        notes.append(f"{copies} copies of the {what} were compared, found equal and left out")
    return Foreign(shape, weights, _tokenizer(source, shape), [config, *files.paths], notes)


def _cast(source: Path, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another type, in which none of its numbers may become infinite."""
    cast = weight.to(dtype)
    if weight.isfinite().all() and not cast.isfinite().all():
        raise UsageError(
            f"{source}: '{name}' holds numbers up to {float(weight.abs().max()):.3g}, and {str(dtype)[6:]} ends at "
            f"{torch.finfo(dtype).max:.3g}; take --dtype bfloat16"
        )
    return cast


def _refuse_what_is_no_llama(path: Path, stated: Mapping[str, Any]) -> None:
    kind = stated.get("model_type")
    if kind == MODEL_TYPE:
        raise UsageError(f"{path}: is a model directory of this project already; use it as it is")
    if kind not in ("llama", "qwen3"):
        raise UsageError(f"{path}: model_type is {kind!r:.40}; Llama models are read here")
    rope = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    wanted = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    wanted |= {"rope_type": "default", "quantization_config": None}
    found = {**stated, "rope_type": rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else str(rope)}
    for key, value in wanted.items():
        if found.get(key) not in (None, value):
            raise UsageError(f"{path}: {key} is {str(found[key])[:60]!r}; such models are not read here")


def _shape(path: Path, stated: Mapping[str, Any], files: WeightFiles, notes: list[str]) -> ModelConfig:
    """Return the shape that the weights have; only what they cannot tell is taken from config.json."""

    def rows_columns(name: str) -> tuple[int, int]:
        size = files.shapes.get(name, ())
        if len(size) != 2:
            raise CorruptDataError(f"{path.parent}: holds no matrix '{name}'; fetch the weights again")
        return size[0], size[1]

    def number(key: str, kind: type, default: Any = None) -> Any:
        value = stated.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or kind(value) != value:
            raise CorruptDataError(f"{path}: {key} is {str(value)[:40]!r}, not a positive number; fetch it again")
        return kind(value)

    vocabulary, width = rows_columns(EMBEDDING)
    queries, keys, inner = (
        rows_columns(f"model.layers.0.{part}.weight")[0]
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    )
    heads = number("num_attention_heads", int)
    head = number("head_dim", int, max(1, queries // heads))
    if queries != heads * head or keys % head:
        raise CorruptDataError(
            f"{path}: {heads} heads of {head} are not what the weights have (queries of {queries}, keys of {keys} numbers); "
            "fetch the files again"
        )
    said = stated.get("num_key_value_heads", heads)
    if said != keys // head:
        notes.append(f"{CONFIG_FILE} states {said} key/value heads; the weights have {keys // head}, which counts")
    tied = bool(stated.get("tie_word_embeddings", False)) and (
        HEAD not in files or torch.equal(files[HEAD], files[EMBEDDING])
    )
    rope = stated.get("rope_parameters") or {}
    shape = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=number("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=None if keys == queries else keys // head,
        head_dim=None if heads * head == width else head,
        share="none",
        max_position_embeddings=number("max_position_embeddings", int, 2048),
        rms_norm_eps=number("rms_norm_eps", float, 1e-6),
        rope_theta=float(rope.get("rope_theta") or number("rope_theta", float, 10000.0)),
        qk_norm=stated["model_type"] == "qwen3",
        tie_word_embeddings=tied,
    )
    return shape


def _check_tensors(source: Path, shape: ModelConfig, files: WeightFiles) -> None:
    """Refuse weights that are not exactly those of an unshared model of this shape."""
    check_layers(source / CONFIG_FILE, shape.num_hidden_layers, shape.share, len(files))
    wanted = {_origin(name, shape): weight_shape(name, shape) for name in stored_names(shape).values()}
    check_weights(source, wanted, files.shapes)
    exponents = torch.arange(0, shape.attention_head_dim, 2) / shape.attention_head_dim
    for name in files.shapes.keys() - wanted.keys():
        if name.endswith("rotary_emb.inv_freq"):
            stored = files[name].float()
            if len(stored) != len(exponents) or not torch.allclose(stored, shape.rope_theta**-exponents, rtol=0.01):
                raise UsageError(
                    f"{source}: '{name}' are not the frequencies of rope_theta; such models are not read here"
                )
        elif not (name == HEAD and shape.tie_word_embeddings):
            raise UsageError(
                f"{source}: '{name}' has no place in a Llama without biases; such models are not read here"
            )


def _origin(name: str, shape: ModelConfig) -> str:
    """Return a Llama's name of one of our weights: that of the first layer that uses it."""
    match = re.fullmatch(r"model\.(layers|ffns)\.(\d+)\.(.*)", name)
    if match is None:
        return name
    uses = [pair[match[1] == "ffns"] for pair in shape.layer_weights]
    part = "mlp." if match[1] == "ffns" else ""
    return f"model.layers.{uses.index(int(match[2]))}.{part}{match[3]}"


def find_sharing(
    plain: ModelConfig, files: Mapping[str, Tensor], claimed: bool, source: Path, show: Show = quiet
) -> ModelConfig:
    """Return the shape with what layers share, found by comparing an unshared model's copies bit for bit.

    Args:
        plain: the shape without sharing.
        files: tensors by Llama's names.
        claimed: whether the networks of all layers are to be one.
        source: named in errors.
        show: told the progress.

    Raises:
        CorruptDataError: copies differ that are claimed to be equal, or some are equal and others are not.
    """
    layers = plain.num_hidden_layers
    if layers == 1:
        return plain
    starts, differing = [0], ""
    for index in range(1, layers):
        difference = _difference(files, starts[-1], index, [f"mlp.{part}" for part in _FFN_PARTS])
        if difference:
            starts.append(index)
            differing = differing or difference
        show("compare layers", index + 1, layers)
    if len(starts) == layers and not claimed:
        return plain
    grouped = dataclasses.replace(plain, share="ffn", ffn_groups=len(starts))
    deal = [ffn for _, ffn in grouped.layer_weights]
    if [deal.index(ffn) for ffn in range(len(starts))] != starts or (claimed and len(starts) > 1):
        raise CorruptDataError(
            f"{source}: {differing}, though they are to be one; import it with --unshared to keep each layer's own (an "
            "official 1.2B has none in common), or fetch the weights again"
        )
    own = [f"self_attn.{part}_proj" for part in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
    own += ["self_attn.q_norm", "self_attn.k_norm"] if plain.qk_norm else []
    if len(starts) == 1 and not any(_difference(files, 0, index, own) for index in range(1, layers)):
        return dataclasses.replace(plain, share="block")
    return grouped


def _difference(files: Mapping[str, Tensor], first: int, second: int, parts: list[str]) -> str:
    """Return a clause on the first tensor in which two layers differ, or nothing."""
    for part in parts:
        one, other = (files[f"model.layers.{index}.{part}.weight"] for index in (first, second))
        if not torch.equal(one, other):
            amount = (one.float() - other.float()).abs().max()
            return f"layer {second}'s {part} differs from layer {first}'s by up to {float(amount):.3g}"
    return ""


def _tokenizer(source: Path, shape: ModelConfig) -> Tokenizer:
    """Return the directory's tokenizer: the sentencepiece model, unless only tokenizer.json has all the ids."""
    tokenizer = load_tokenizer(source)
    if (
        tokenizer.path.name == MODEL_FILE
        and tokenizer.vocab_size != shape.vocab_size
        and (source / JSON_FILE).is_file()
    ):
        return load_tokenizer(source / JSON_FILE)
    return tokenizer
