"""Keys and values in 8 bits: a quarter of the memory, at a scale for each channel that is found on real text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mobillama.engine.load import GRAPH_FILE
from mobillama.engine.onnx_engine import OnnxEngine

_ROOM = 1.25  # other texts may reach beyond what this one did; further out a number is cut off
_SCALES = 12  # place of k_scale among GroupQueryAttention's inputs; v_scale follows


def quantize_cache(directory: Path, rows: Sequence[Sequence[int]]) -> None:
    """Let an exported graph keep its cache as int8 instead of float32.

    Args:
        directory: of a graph that :func:`mobillama.deploy.onnx_graph.write_graph` made; its ``model.onnx`` is rewritten.
        rows: passages of ids; a channel's scale is set by the largest key or value that they give.
    """
    largest = _largest(OnnxEngine.load(directory), rows)
    model = onnx.load(directory / GRAPH_FILE, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key", "past_value", "present_")):
            value.type.tensor_type.elem_type = TensorProto.INT8
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        parts = [name for name in node.input if name.startswith(("past_key", "past_value"))]
        node.input.extend([""] * (_SCALES - len(node.input)))
        for name in parts:
            scale_1h1d = largest[name][None, :, None, :] * np.float32(_ROOM / 127)
            tensor = numpy_helper.from_array(np.maximum(scale_1h1d, np.float32(1e-8)), f"{name}/scale")
            model.graph.initializer.append(tensor)
            node.input.append(tensor.name)
        for name in ("k_quant_type", "v_quant_type"):
            node.attribute.append(helper.make_attribute(name, "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    (directory / GRAPH_FILE).write_bytes(model.SerializeToString(deterministic=True))


def _largest(engine: OnnxEngine, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """Return the largest magnitude (h, d) of each layer's keys and values."""
    largest: dict[str, NDArray[np.float32]] = {}
    for ids in rows:
        engine.truncate(0)
        engine.feed(ids[:-1])  # as long as a context at most
        for name, part_1htd in engine.keys_and_values().items():
            found_hd = np.abs(part_1htd[0]).max(axis=1)
            largest[name] = np.maximum(largest.get(name, found_hd), found_hd)
    return largest
