"""Which weights a model of a shape stores, by this project's names; what a file states is held to it before a model is built.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from mobillama.errors import CorruptDataError, UsageError
from mobillama.recipe import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MOST_SHARED_LAYERS = 512  # of one shared block, whose weights do not bound them


def check_layers(place: object, layers: int, share: str, stored: int) -> None:
    """Refuse more layers than stored weights can make, before anything is counted layer by layer.

    Args:
        place: named in the error.
        layers: that a file states.
        share: what they share.
        stored: number of the file's tensors.

    Raises:
        CorruptDataError: there are more.
    """
    if layers > (_MOST_SHARED_LAYERS if share == "block" else stored):
        raise CorruptDataError(
            f"{place}: states {layers:,} layers; fewer have weights; fetch or export the model again"
        )


def check_weights(place: object, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are missing or of another shape.

    Args:
        place: named in the error.
        wanted: shapes by name.
        found: shapes by name, others among them.

    Raises:
        CorruptDataError: naming the first such weight.
    """
    for name, size in wanted.items():
        if found.get(name) != size:
            what = f"has the shape {found[name]}" if name in found else "is missing"
            raise CorruptDataError(f"{place}: '{name}' {what}, and is to be {size}; fetch or export the model again")


def weight_shape(name: str, shape: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a weight by its name in this project."""
    width, inner, head = shape.hidden_size, shape.intermediate_size, shape.attention_head_dim
    queries, keys = shape.num_attention_heads * head, shape.key_value_heads * head
    part = name.split(".")[-2]
    if part in ("embed_tokens", "lm_head"):
        return shape.vocab_size, width
    if part in ("q_norm", "k_norm"):
        return (head,)
    matrices = {
        "q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, queries),
        "gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner),
    }  # fmt: skip
    return matrices.get(part, (width,))


def check_vocabulary(place: object, ids: int, rows: int, exact: bool = False) -> None:
    """Refuse a tokenizer that is not the model's.

    Args:
        place: of the tokenizer, named in the error.
        ids: of the tokenizer.
        rows: of the model's vocabulary.
        exact: refuse fewer ids than rows, too: rows that no id names are padding, which decoding must not draw.

    Raises:
        UsageError: it has more ids than the model, or with ``exact`` another number.
    """
    if ids > rows or (exact and ids != rows):
        raise UsageError(
            f"{place}: the tokenizer has {ids:,} ids, the model {rows:,}; put the model's own tokenizer there"
        )
