"""The model that an export starts from, opened from a model directory or a GGUF file, and how its weights are rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mobillama.data.tokenizer import Tokenizer, load_tokenizer
from mobillama.directory import load_model
from mobillama.engine.blocks import BF16, F16, F32, Q4_0, Q4_1, Q8_0, BlockType, decode
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import GGUFModel, read_model
from mobillama.engine.interface import does_not_fit
from mobillama.engine.torch_gguf import decode_weights
from mobillama.engine.weights import check_vocabulary
from mobillama.errors import UsageError, VerificationError
from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig
from mobillama.record.environment import memory_bytes

# ‖w - decoded‖ / ‖w‖ of a matrix, which rounding to nearest cannot exceed. A block of 32 is worst where one number sets the
# step and all others are just below half of it; numbers too small for a type are lost, and that is told.
_MOST_ERROR = {F32.name: 0.0, F16.name: 1e-3, BF16.name: 4e-3, Q8_0.name: 0.025, Q4_0.name: 0.4, Q4_1.name: 0.4}


@dataclass(frozen=True)
class Source:
    """A model to export: a model directory, or a GGUF file of this project."""

    shape: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, torch.Tensor]
    """In the type that they are stored in; decoded where that is none of torch's."""
    encoded: dict[str, Tensor] | None
    """The same as encoded bytes, where the source has them."""
    name: str
    """For people."""

    @classmethod
    def open(cls, path: Path) -> Source:
        """Read a model directory or a GGUF file.

        Raises:
            UsageError: it is neither, or its tokenizer has more ids than the model.
            CorruptDataError: it is damaged.
        """
        if path.is_file():
            read = read_model(path)
            opened = cls(read.shape, read.tokenizer, decode_weights(read), read.tensors, _name(path))
        else:
            model = load_model(path)
            opened = cls(model.model.shape, load_tokenizer(path), model.state_dict(), None, _name(path))
        check_vocabulary(opened.tokenizer.path, opened.tokenizer.vocab_size, opened.shape.vocab_size)
        return opened

    def model(self) -> MobiLlama:
        """Return the model in float32, in evaluation mode."""
        return _built(self.shape, self.weights)

    def decoded(self, tensors: Mapping[str, Tensor]) -> MobiLlama:
        """Return the model that holds the numbers of encoded tensors; weights that are not among them are its own."""
        numbers = decode_weights(GGUFModel(self.shape, dict(tensors)), torch.float32)
        return _built(self.shape, self.weights | numbers)

    def checked(self, tensors: Mapping[str, Tensor], place: object) -> dict[str, Tensor]:
        """Encode tensors, and hold each to the weight that it was rounded from.

        Args:
            tensors: rounded to nearest, or the source's own.
            place: named in the error.

        Returns:
            The tensors with their bytes made, so that they are encoded once.

        Raises:
            VerificationError: one is further from its weight than rounding to nearest explains.
        """
        made = {}
        for name, tensor in tensors.items():
            made[name] = tensor
            if self.encoded is not None and tensor is self.encoded[name]:
                continue
            made[name] = dataclasses.replace(tensor, data=tensor.rows)
            weight = self.weights[name].float()
            numbers = torch.from_numpy(decode(made[name].rows, tensor.kind)).view(weight.shape)
            error, most = float((numbers - weight).norm()), _MOST_ERROR[tensor.kind.name] * float(weight.norm())
            if not error <= most:  # a NaN too
                raise VerificationError(
                    f"{place}: '{name}' in {tensor.kind.name} is {error:.3g} from the model's, where rounding explains "
                    f"{most:.3g}; nothing was kept: choose a wider type, or report this"
                )
        return made


def head_kind(kind: BlockType) -> BlockType:
    """Return the type of the head in a file of ``kind``: eight bits where the rest has four.

    Its rounding meets every prediction directly, and nothing after it can make up for it.
    """
    return Q8_0 if kind in (Q4_0, Q4_1) else kind


def refuse_existing(*paths: Path) -> None:
    """Raise a UsageError if there is something at one of ``paths`` already."""
    for path in paths:
        if path.exists():
            raise UsageError(f"{path}: exists already; choose another name or remove it")


def with_context(shape: ModelConfig, context: int | None) -> ModelConfig:
    """Return a shape with places for ``context`` tokens, or for as many as the model was made for.

    Raises:
        UsageError: these are more than the model was made for, or fewer than two.
    """
    most = shape.max_position_embeddings
    if context is not None and not 2 <= context <= most:
        raise UsageError(f"--context: {context} is not within 2…{most}, what the model was made for")
    return dataclasses.replace(shape, max_position_embeddings=context or most)


def check_memory(source: Path, shape: ModelConfig) -> None:
    """Refuse a context whose float32 cache and rotary tables are more than the machine's memory: both are made here."""
    cached = 2 * shape.num_hidden_layers * shape.key_value_heads * shape.attention_head_dim
    need = 4 * shape.max_position_embeddings * (cached + shape.attention_head_dim)
    if need > memory_bytes():
        raise does_not_fit(source, shape.max_position_embeddings)


def _built(shape: ModelConfig, weights: dict[str, torch.Tensor]) -> MobiLlama:
    with torch.device("meta"):
        model = MobiLlama(shape)
    model.load_state_dict(weights, assign=True)
    return model.float().eval()


def _name(source: Path) -> str:
    """Return a name for people: a checkpoint's ``model`` directory is called by its run and step."""
    place = source.resolve()
    if place.parent.parent.name == "checkpoints":
        return f"{place.parents[2].name}-{place.parent.name}"
    return place.stem if source.is_file() else place.name
