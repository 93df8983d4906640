"""Between GGUF files and torch: weights decoded into the model, and a model's weights encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.blocks import BF16, F16, F32, BlockType, decode, encode
from mobillama.engine.gguf import Tensor
from mobillama.engine.gguf_model import GGUFModel, read_model
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.errors import UsageError
from mobillama.model.transformer import MobiLlama

_CHUNK = 1 << 22  # numbers cast to float32 at once


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> tuple[MobiLlama, Tokenizer]:
    """Return the model and the tokenizer of a GGUF file, in evaluation mode, numbers decoded.

    Args:
        path: the file.
        dtype: type of the weights; absent: see :func:`decode_weights`.

    Raises:
        UsageError: it is no GGUF of a Llama, or holds types that are not read here.
        CorruptDataError: it is damaged.
    """
    read = read_model(path)
    with torch.device("meta"):
        model = MobiLlama(read.shape)
    model.load_state_dict(decode_weights(read, dtype), assign=True)
    return model.eval(), read.tokenizer


def decode_weights(
    read: GGUFModel, dtype: torch.dtype | None = None, show: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, torch.Tensor]:
    """Return the state dict of a model that was read from a GGUF file.

    Args:
        read: the model.
        dtype: type of all weights; absent: the narrowest that keeps every bit.
        show: told the number of tensors decoded so far, and of all.
    """
    dtype = dtype or _exact_dtype(read)
    weights = {}
    for number, (name, tensor) in enumerate(read.tensors.items(), 1):
        values = torch.from_numpy(decode(tensor.rows, tensor.kind).reshape(tensor.shape))
        weights[name] = values.to(dtype)
        show(number, len(read.tensors))
    return weights


def _exact_dtype(read: GGUFModel) -> torch.dtype:
    kinds = {tensor.kind.name for tensor in read.tensors.values() if len(tensor.shape) == 2}
    dtype = {F16.name: torch.float16, BF16.name: torch.bfloat16}.get(kinds.pop()) if len(kinds) == 1 else None
    if dtype is None:
        return torch.float32
    vectors = (decode(tensor.rows, tensor.kind) for tensor in read.tensors.values() if len(tensor.shape) == 1)
    survives = all(torch.equal((v := torch.from_numpy(vector)).to(dtype).float(), v) for vector in vectors)
    return dtype if survives else torch.float32


def encode_weights(weights: Mapping[str, torch.Tensor], kind: BlockType, head: BlockType) -> dict[str, Tensor]:
    """Return a state dict's tensors for :func:`mobillama.engine.gguf_model.write_model`, encoded when they are written.

    Norms stay F32. A matrix whose rows are no whole number of blocks becomes F16.

    Args:
        weights: the state dict of a model.
        kind: of matrices.
        head: of the head, or of the embedding table where it is the head.
    """
    heads = HEAD if HEAD in weights else EMBEDDING
    tensors = {}
    for name, weight in weights.items():
        wanted = F32 if weight.dim() == 1 else head if name == heads else kind
        chosen = wanted if weight.shape[-1] % wanted.values == 0 else F16
        tensors[name] = Tensor(name, tuple(weight.shape), chosen, _encoder(name, weight, chosen))
    return tensors


def _encoder(name: str, weight: torch.Tensor, kind: BlockType) -> Callable[[], NDArray[np.uint8]]:
    def run() -> NDArray[np.uint8]:
        rows = weight.detach().reshape(-1, weight.shape[-1])
        out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
        step = max(1, _CHUNK // rows.shape[1])
        try:
            for start in range(0, len(rows), step):
                out[start : start + step] = encode(rows[start : start + step].float().cpu().numpy(), kind)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        return out

    return run
