"""The transformers config: the model's shape and nothing else."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mobillama.directory import AUTO_MAP, MODEL_TYPE
from mobillama.recipe import ModelConfig


class MobiLlamaConfig(PreTrainedConfig):
    """Config of :class:`MobiLlamaForCausalLM`; takes the fields of :class:`mobillama.recipe.ModelConfig` by name."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(self, **settings: Any) -> None:
        names = {item.name for item in fields(ModelConfig)}
        shape = ModelConfig(**{name: settings.pop(name) for name in names & settings.keys()})
        for name, value in asdict(shape).items():
            setattr(self, name, value)
        settings.setdefault("auto_map", AUTO_MAP)
        settings["tie_word_embeddings"] = shape.tie_word_embeddings
        super().__init__(**settings)

    @property
    def shape(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig(**{item.name: getattr(self, item.name) for item in fields(ModelConfig)})
