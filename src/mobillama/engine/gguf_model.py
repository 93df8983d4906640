"""A model as a GGUF file: shape, weights under this project's names, tokenizer. Imports no torch.

Written once or for each layer: a *shared* file stores what layers share with the first layer that uses it (the shared
feed-forward network is ``blk.0.ffn_*``) and nothing with the others; ``mobillama.share`` and ``mobillama.ffn_groups`` say so.
An *unshared* file is what stock llama.cpp loads. Names and metadata are llama.cpp's, which stores the rows of ``attn_q`` and
``attn_k`` in another order (architecture ``llama``): pairs that rotate together stand side by side, not half a head apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mobillama.data.tokenizer import JsonTokenizer, Tokenizer
from mobillama.data.vocabulary import UNUSED, Vocabulary
from mobillama.engine.gguf import GGUF, Tensor, read_gguf, write_gguf
from mobillama.engine.weights import EMBEDDING, HEAD, check_layers, check_vocabulary, check_weights, weight_shape
from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import ModelConfig

SHARE_KEY, GROUPS_KEY = "mobillama.share", "mobillama.ffn_groups"
_OUTER = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
_FFN = {"ffn_gate.weight": "gate_proj.weight", "ffn_up.weight": "up_proj.weight", "ffn_down.weight": "down_proj.weight"}


@dataclass(frozen=True)
class GGUFModel:
    """A model read from a GGUF file."""

    shape: ModelConfig
    tensors: dict[str, Tensor]
    """The stored weights by this project's names (those of ``MobiLlama.state_dict()``), each once, bytes as in the file."""
    file: GGUF | None = None
    """Where they are from."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer, built when it is first asked for: that takes longer than all else.

        Raises:
            UsageError: it is of a type that is not known here.
            CorruptDataError: it contradicts itself.
        """
        assert self.file is not None, "made of tensors, not of a file"
        return read_tokenizer(self.file)


def stored_names(shape: ModelConfig) -> dict[str, str]:
    """Return, for each tensor of a shared file, its name in GGUF and in this project, in the order of the file."""
    return _names(shape, repeated=False)


def _names(shape: ModelConfig, repeated: bool) -> dict[str, str]:
    layer_names = {theirs: ours for theirs, ours in _LAYER.items() if shape.qk_norm or theirs not in _QK_NORMS}
    names = {theirs: ours for theirs, ours in _OUTER.items() if theirs != "output.weight"}
    seen: set[tuple[str, int]] = set()
    for index, (layer, ffn) in enumerate(shape.layer_weights):
        if repeated or ("layer", layer) not in seen:
            names |= {f"blk.{index}.{theirs}": f"model.layers.{layer}.{ours}" for theirs, ours in layer_names.items()}
        if repeated or ("ffn", ffn) not in seen:
            names |= {f"blk.{index}.{theirs}": f"model.ffns.{ffn}.{ours}" for theirs, ours in _FFN.items()}
        seen |= {("layer", layer), ("ffn", ffn)}
    return names | ({} if shape.tie_word_embeddings else {"output.weight": HEAD})


def read_model(path: Path, keep_copies: bool = False) -> GGUFModel:
    """Open a GGUF file of a Llama: written by this project, shared or not, or by llama.cpp's tools.

    Copies of what ``mobillama.share`` calls shared are compared and counted once; so are those in a file that does not say,
    where all layers' networks, or whole blocks, are equal.

    Args:
        path: the file.
        keep_copies: take the layers as they are stored, whatever they share.

    Raises:
        UsageError: it is no GGUF of a Llama, holds types that are not read here, or has no copies to keep.
        CorruptDataError: it is damaged, or what it calls shared differs between layers.
    """
    file = read_gguf(path)
    shape = _read_shape(file, keep_copies)
    names, repeated = _names(shape, repeated=False), _names(shape, repeated=True)
    unknown = sorted(file.tensors.keys() - repeated.keys())
    if unknown:
        raise UsageError(
            f"{path}: tensor '{unknown[0]}' has no place in a Llama without biases; such models are not read"
        )
    missing = sorted(names.keys() - file.tensors.keys())
    if missing and keep_copies and SHARE_KEY in file.metadata:
        raise UsageError(f"{path}: stores once what layers share, so there are no copies to keep; leave out --unshared")
    if missing:
        raise CorruptDataError(f"{path}: holds no tensor '{missing[0]}'; fetch or export the file again")
    for original, ours in names.items():
        copies = [theirs for theirs in file.tensors.keys() - names.keys() if repeated[theirs] == ours]
        if differing := _first_that_differs(file, original, copies):
            raise CorruptDataError(
                f"{path}: '{differing}' is to be the same as '{original}' ({SHARE_KEY} says) and differs; import it with "
                "--unshared to keep each"
            )
    wanted = {theirs: weight_shape(ours, shape) for theirs, ours in names.items()}
    check_weights(path, wanted, {theirs: tensor.shape for theirs, tensor in file.tensors.items()})
    tensors = {name: _reordered(file.tensors[theirs], name, name, shape, _half_apart) for theirs, name in names.items()}
    return GGUFModel(shape, tensors, file)


def write_model(
    path: Path,
    shape: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    shared: bool,
    name: str = "",
    metadata: Mapping[str, Any] | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a model as a GGUF file, whole or not at all; encoded bytes are stored as they are given.

    Args:
        path: the file to write.
        shape: the model's.
        tensors: the stored weights by this project's names; norms are F32 in all files that llama.cpp reads.
        tokenizer: the model's.
        shared: store what layers share once; else with every layer that uses it, as stock llama.cpp demands.
        name: of the model, for people.
        metadata: what else the file is to state.
        show: told the bytes written so far, and of all.

    Raises:
        UsageError: the tokenizer is of a type that GGUF has no name for, or has more ids than the model.
        OSError: the file cannot be written.
    """
    names = _names(shape, repeated=not shared)
    placed = [_reordered(tensors[ours], theirs, ours, shape, _side_by_side) for theirs, ours in names.items()]
    facts = _shape_metadata(shape, name) | {"general.file_type": _file_type(tensors)} | dict(metadata or {})
    write_gguf(path, facts | tokenizer_metadata(tokenizer, shape.vocab_size), placed, show)


def _reordered(
    tensor: Tensor,
    name: str,
    ours: str,
    shape: ModelConfig,
    order: Callable[[NDArray[np.uint8], int], NDArray[np.uint8]],
) -> Tensor:
    """Return a tensor under another name, the rows of queries and keys in another order (when they are asked for).

    Blocks run along rows, so nothing is decoded.
    """
    if shape.qk_norm or not ours.endswith(("q_proj.weight", "k_proj.weight")):
        return dataclasses.replace(tensor, name=name)
    return dataclasses.replace(tensor, name=name, data=lambda: order(tensor.rows, shape.attention_head_dim))


def _side_by_side(rows_rb: NDArray[np.uint8], head_dim: int) -> NDArray[np.uint8]:
    """Reorder each head's rows from (i, i + d/2) halves to pairs that stand side by side."""
    width = rows_rb.shape[1]
    return rows_rb.reshape(-1, 2, head_dim // 2, width).swapaxes(1, 2).reshape(-1, width)


def _half_apart(rows_rb: NDArray[np.uint8], head_dim: int) -> NDArray[np.uint8]:
    width = rows_rb.shape[1]
    return rows_rb.reshape(-1, head_dim // 2, 2, width).swapaxes(1, 2).reshape(-1, width)


def _file_type(tensors: Mapping[str, Tensor]) -> int:
    """Return llama.cpp's number of the type that most bytes of matrices have."""
    sizes: dict[int, int] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and name not in (EMBEDDING, HEAD):
            sizes[tensor.kind.file_type] = sizes.get(tensor.kind.file_type, 0) + tensor.nbytes
    return max(sizes, key=lambda kind: sizes[kind])


def _shape_metadata(shape: ModelConfig, name: str) -> dict[str, Any]:
    arch = "qwen3" if shape.qk_norm else "llama"  # stock Llama with QK-norm is Qwen3
    head = shape.attention_head_dim
    facts = {
        "vocab_size": shape.vocab_size,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_hidden_layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "rope.dimension_count": head,
        "rope.freq_base": shape.rope_theta,
    }
    return {
        "general.architecture": arch,
        "general.type": "model",
        **({"general.name": name} if name else {}),
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in facts.items()},
        SHARE_KEY: shape.share,
        GROUPS_KEY: shape.ffn_groups,
    }


def _read_shape(file: GGUF, keep_copies: bool) -> ModelConfig:
    path = file.path

    def stated(key: str, default: Any = None) -> Any:
        value = file.metadata.get(key, default)
        if value is not None and not isinstance(value, str | int | float):
            raise CorruptDataError(f"{path}: '{key}' is a list, not one value; fetch the file again")
        return value

    arch = stated("general.architecture")
    if arch not in ("llama", "qwen3"):
        raise UsageError(f"{path}: holds a model of architecture {arch!r:.40}; Llama models are read here")

    def fact(key: str, kind: type, default: Any = None) -> Any:
        value = stated(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise CorruptDataError(f"{path}: '{arch}.{key}' is {value!r:.40}, not a number; fetch the file again")
        return kind(value)

    for key in ("rope.scaling.type", "expert_count", "attention.sliding_window"):
        if (value := stated(f"{arch}.{key}")) not in (None, 0, "none"):
            raise UsageError(f"{path}: '{arch}.{key}' is {value!r:.40}; such models are not read here")
    heads, width, layers = (fact(key, int) for key in ("attention.head_count", "embedding_length", "block_count"))
    share: Any
    share, groups = ("none", 1) if keep_copies else (stated(SHARE_KEY), stated(GROUPS_KEY, 1))
    share = _found_share(file, layers) if share is None else share
    check_layers(path, layers, share, len(file.tensors))
    known = get_args(get_type_hints(ModelConfig)["share"])
    if share not in known or not isinstance(groups, int):
        raise CorruptDataError(
            f"{path}: states {layers:,} layers that share {share!r:.40} in {groups!r:.40} groups; fetch the file again"
        )
    # A float32 of a file is not the double that was meant: 1e-5, not 9.999999747378752e-06.
    eps, theta = (
        float(str(np.float32(fact(key, float, default))))
        for key, default in (("attention.layer_norm_rms_epsilon", None), ("rope.freq_base", 10000.0))
    )
    if "token_embd.weight" not in file.tensors:
        raise CorruptDataError(f"{path}: holds no tensor 'token_embd.weight'; fetch or export the file again")
    head = fact("attention.key_length", int, width // max(1, heads))
    if fact("rope.dimension_count", int, head) != head:
        raise UsageError(f"{path}: rotates only a part of each head; such models are not read here")
    try:
        return ModelConfig(
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=width,
            intermediate_size=fact("feed_forward_length", int),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fact("attention.head_count_kv", int, heads),
            head_dim=None if head * heads == width else head,
            share=share,
            ffn_groups=groups,
            max_position_embeddings=fact("context_length", int, 2048),
            rms_norm_eps=eps,
            rope_theta=theta,
            qk_norm=arch == "qwen3",
            tie_word_embeddings="output.weight" not in file.tensors,
        )
    except (UsageError, TypeError, ValueError) as error:
        raise CorruptDataError(f"{path}: states no possible model ({error}); fetch the file again") from None


def _found_share(file: GGUF, layers: int) -> Any:
    """Return what all layers of a file that does not say have in common, from a look up to the first difference."""

    def equal(parts: Iterable[str]) -> bool:
        return all(
            f"blk.0.{part}" in file.tensors
            and not _first_that_differs(file, f"blk.0.{part}", [f"blk.{index}.{part}" for index in range(1, layers)])
            for part in parts
        )

    if not 1 < layers <= len(file.tensors) or not equal(_FFN):
        return "none"
    return "block" if equal([name for name in _LAYER if f"blk.0.{name}" in file.tensors]) else "ffn"


def _first_that_differs(file: GGUF, original: str, copies: Sequence[str]) -> str | None:
    """Return the first of some tensors that is missing or not the same as another."""
    if not copies:
        return None
    rows = file.tensors[original].rows
    differing = (
        name for name in copies if name not in file.tensors or not np.array_equal(file.tensors[name].rows, rows)
    )
    return next(differing, None)


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return a tokenizer as GGUF metadata (``tokenizer.*``), with unused ids up to the model's vocabulary.

    Raises:
        UsageError: it is of a type that GGUF has no name for, or has more ids than the model.
    """
    vocabulary = tokenizer.vocabulary
    check_vocabulary(tokenizer.path, len(vocabulary.pieces), vocab_size)
    unused = vocab_size - len(vocabulary.pieces)
    pieces = [*vocabulary.pieces, *(f"[PAD{vocab_size - unused + i}]" for i in range(unused))]
    facts: dict[str, Any] = {
        "model": vocabulary.kind,
        "pre": vocabulary.words or "default",
        "tokens": pieces,
        "token_type": np.array([*vocabulary.kinds, *[UNUSED] * unused], np.int32),
    }
    if vocabulary.kind == "llama":
        facts["scores"] = np.array([*vocabulary.scores, *[0.0] * unused], np.float32)
        facts["add_space_prefix"] = vocabulary.add_space
    else:
        facts["merges"] = [f"{left} {right}" for left, right in vocabulary.merges]
    special = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unknown": vocabulary.unk_id}
    facts |= {f"{name}_token_id": token for name, token in special.items() if token is not None}
    facts |= {"add_bos_token": vocabulary.add_bos, "add_eos_token": False}
    found = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    return found if vocabulary.chat_template is None else found | {"tokenizer.chat_template": vocabulary.chat_template}


def read_tokenizer(file: GGUF) -> JsonTokenizer:
    """Return the tokenizer that a GGUF file's metadata state.

    Raises:
        UsageError: it is of a type that is not known here.
        CorruptDataError: it contradicts itself.
    """
    stated = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind = stated.get("model")
    if not isinstance(kind, str) or kind not in ("llama", "gpt2"):
        raise UsageError(f"{file.path}: has a tokenizer of type {kind!r:.40}; 'llama' and 'gpt2' are read here")
    template = stated.get("tokenizer.chat_template")
    try:
        pieces = list(stated["tokens"])
        vocabulary = Vocabulary(
            kind=kind,
            pieces=pieces,
            kinds=[int(its) for its in stated["token_type"]],
            scores=[float(score) for score in stated["scores"]] if kind == "llama" else [],
            merges=[_pair(merge) for merge in stated["merges"]] if kind == "gpt2" else [],
            words=str(stated.get("pre", "gpt-2")) if kind == "gpt2" else "",
            bos_id=stated.get("bos_token_id"),
            eos_id=stated.get("eos_token_id"),
            unk_id=stated.get("unknown_token_id"),
            add_bos=bool(stated.get("add_bos_token", kind == "llama" or stated.get("pre") == "llama-bpe")),
            add_space=bool(stated.get("add_space_prefix", True)),
            chat_template=template if isinstance(template, str) else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise CorruptDataError(f"{file.path}: its tokenizer is incomplete ({error}); fetch the file again") from None
    return JsonTokenizer.from_vocabulary(vocabulary, file.path)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
