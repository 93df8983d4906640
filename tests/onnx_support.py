"""Graphs of small random models, for the tests of the export and of the engine."""

from __future__ import annotations

import torch

from mobillama.deploy.onnx_graph import FLOAT32_ACTIVATIONS, write_graph
from mobillama.engine.blocks import Q4_0, decode, encode
from mobillama.model.transformer import MobiLlama, initialise
from mobillama.recipe import ModelConfig

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def model_and_graph(directory, kind=Q4_0, head=None, activations=FLOAT32_ACTIVATIONS, **shape):
    """Write the graph of a random model; return the model with the same rounded weights."""
    config = ModelConfig(**SIZES | shape, max_position_embeddings=160, initializer_range=0.15)
    model = MobiLlama(config)
    initialise(model, config, 0)
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    kinds = {name: head if head and name == "lm_head.weight" else kind for name in weights}
    encoded = {name: (encode(w.numpy(), kinds[name]), kinds[name]) for name, w in weights.items() if w.dim() == 2}
    model.load_state_dict(weights | {name: torch.from_numpy(decode(*rows)) for name, rows in encoded.items()})
    write_graph(
        directory, config, encoded.__getitem__, lambda name: weights[f"{name}.weight"].numpy(), activations=activations
    )
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].numpy()
