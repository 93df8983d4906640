"""The decoder as an ONNX graph of block-quantized products, written node by node; needs neither torch nor its exporter.

Inputs: ``input_ids`` (1, t), ``past_length`` (1) tokens already held, ``first`` (1) the first of the t tokens whose logits
are wanted, and for each layer ``past_key_I`` and ``past_value_I`` (1, heads, context, d). Outputs: ``logits``
(1, t - first, vocabulary) and ``present_key_I``, ``present_value_I``, to be bound to the buffers of the past ones: attention
then writes the new tokens into them and moves nothing else.

A shared network's initializers stand in the file once and are named by every layer. Scales are stored as float16, as in
GGUF, and widened while the file is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mobillama.engine.blocks import BLOCK, Q4_0, Q8_0, Blocks, BlockType, decode, encode, unpack
from mobillama.engine.load import GRAPH_FILE
from mobillama.engine.onnx_engine import DATA_FILE, FORMAT, METADATA_KEY
from mobillama.recipe import ModelConfig

Matrix = tuple[NDArray[np.uint8], BlockType]
"""Rows (r, b) of encoded bytes, and how they are encoded."""

_CONTRIB = "com.microsoft"
_INLINE_BYTES = 1024
_LONG_BLOCK = 128
_PAGE = 4096  # external tensors begin at pages, so that they can be mapped
INT8_ACTIVATIONS, FLOAT32_ACTIVATIONS = 4, 1  # accuracy_level of MatMulNBits


def write_graph(
    directory: Path,
    config: ModelConfig,
    matrix: Callable[[str], Matrix],
    vector: Callable[[str], NDArray[np.float32]],
    activations: int = INT8_ACTIVATIONS,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``model.onnx`` and ``model.onnx.data``.

    Args:
        directory: where the two files go.
        config: the model's shape.
        matrix: returns a matrix by its name in a model directory, encoded as Q4_0 or Q8_0.
        vector: returns the weight of a norm.
        activations: what products compute in: activations rounded to 8 bits, which is fast, or float32.
        show: told the layers written, and how many there are.

    Raises:
        OSError: a file cannot be written.
    """
    with open(directory / DATA_FILE, "wb") as data:
        graph = _Graph(data, activations)
        _write_decoder(graph, config, matrix, vector, show)
    facts = {"format": FORMAT, "shape": asdict(config), "weights": graph.bytes, "read_per_token": graph.multiplied}
    model = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", graph.inputs, graph.outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)],
        ir_version=10,
        producer_name="mobillama",
    )
    helper.set_model_props(model, {METADATA_KEY: json.dumps(facts)})
    (directory / GRAPH_FILE).write_bytes(model.SerializeToString(deterministic=True))


def _write_decoder(
    graph: _Graph,
    config: ModelConfig,
    matrix: Callable[[str], Matrix],
    vector: Callable[[str], NDArray[np.float32]],
    show: Callable[[int, int], None],
) -> None:
    graph.input("input_ids", TensorProto.INT64, [1, "tokens"])
    graph.input("past_length", TensorProto.INT32, [1])
    graph.input("first", TensorProto.INT64, [1])
    graph.output("logits", [1, "wanted", config.vocab_size])

    graph.quantized("embed_tokens", [matrix("model.embed_tokens.weight")])
    x = graph.look_up("embed_tokens", "input_ids", config.tie_word_embeddings)

    graph.node("Shape", ["input_ids"], "new_long", start=1, end=2)
    graph.node("Cast", ["new_long"], "new", to=TensorProto.INT32)
    graph.node("Add", ["past_length", "new"], "held")
    graph.node("Sub", ["held", graph.constant("one", np.array([1], np.int32))], "last_place")
    graph.node("Squeeze", ["held", graph.constant("axis_0", np.array([0]))], "held_scalar")
    for name, table in zip(("cos", "sin"), _rotary_tables(config), strict=True):
        graph.constant(name, table)
    lengths = ["last_place", "held_scalar", "cos", "sin"]

    change = ""
    for index, (layer, ffn) in enumerate(config.layer_weights):
        block, network, place = f"model.layers.{layer}.", f"model.ffns.{ffn}.", f"layer_{index}/"
        attention = f"{block}self_attn."

        x, normed = graph.add_and_norm(x, change, f"{block}input_layernorm", vector, config, place + "attention")
        qkv = graph.product(normed, attention + "qkv_proj", [attention + f"{part}_proj" for part in "qkv"], matrix)
        caches = []
        for part in ("key", "value"):
            shape = [1, config.key_value_heads, config.max_position_embeddings, config.attention_head_dim]
            caches += graph.input(f"past_{part}_{index}", TensorProto.FLOAT, shape)
            graph.output(f"present_{part}_{index}", shape)
        heads_in = [qkv, "", ""]
        if config.qk_norm:
            heads_in = _normed_heads(graph, qkv, attention, vector, config, place)
        mixed = graph.node(
            "GroupQueryAttention",
            [*heads_in, *caches, *lengths],
            [place + "mixed", f"present_key_{index}", f"present_value_{index}"],
            domain=_CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.key_value_heads,
            do_rotary=1,
        )
        change = graph.product(mixed, attention + "o_proj", [attention + "o_proj"], matrix)

        x, normed = graph.add_and_norm(x, change, f"{block}post_attention_layernorm", vector, config, place + "network")
        both = graph.product(normed, network + "gate_up", [network + "gate_proj", network + "up_proj"], matrix)
        gate, up = place + "gate", place + "up"
        graph.node("Split", [both], [gate, up], axis=-1, num_outputs=2)
        graph.node("QuickGelu", [gate], place + "silu", domain=_CONTRIB, alpha=1.0)
        gated = graph.node("Mul", [place + "silu", up], place + "gated")
        change = graph.product(gated, network + "down_proj", [network + "down_proj"], matrix)
        show(index + 1, config.num_hidden_layers)

    _, normed = graph.add_and_norm(x, change, "model.norm", vector, config, "final")
    ends = [graph.constant("end", np.array([np.iinfo(np.int64).max])), graph.constant("axis_1", np.array([1]))]
    wanted = graph.node("Slice", [normed, "first", *ends], "normed_wanted")
    if config.tie_word_embeddings:
        graph.product(wanted, "embed_tokens", [], matrix, out="logits")
    else:
        graph.product(wanted, "lm_head", ["lm_head"], matrix, out="logits")


def _normed_heads(
    graph: _Graph,
    qkv: str,
    attention: str,
    vector: Callable[[str], NDArray[np.float32]],
    config: ModelConfig,
    place: str,
) -> list[str]:
    """Return queries, keys and values apart, each head of the first two normalised."""
    width = config.attention_head_dim
    sizes = np.array([config.num_attention_heads, config.key_value_heads, config.key_value_heads]) * width
    graph.node("Split", [qkv, graph.constant("head_sizes", sizes)], [place + part for part in "qkv"], axis=-1)
    for part, size in zip("qk", sizes, strict=False):
        weight = graph.constant(f"{attention}{part}_norm", vector(f"{attention}{part}_norm"))
        graph.node(
            "Reshape", [place + part, graph.constant("as_heads", np.array([1, -1, width]))], f"{place}{part}_heads"
        )
        graph.node(
            "SimplifiedLayerNormalization",
            [f"{place}{part}_heads", weight],
            f"{place}{part}_normed",
            axis=-1,
            epsilon=config.rms_norm_eps,
        )
        joined = graph.constant(f"{part}_joined", np.array([1, -1, size]))
        graph.node("Reshape", [f"{place}{part}_normed", joined], f"{place}{part}_joined")
    return [place + "q_joined", place + "k_joined", place + "v"]


def _rotary_tables(config: ModelConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin (context, d/2), computed as :func:`mobillama.model.rotary.rotary_tables` does."""
    width = config.attention_head_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    angles = np.arange(config.max_position_embeddings, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


class _Graph:
    """Nodes and initializers as they are added; large initializers go straight to the data file."""

    def __init__(self, data: Any, activations: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.bytes = self.multiplied = 0
        self._data, self._activations = data, activations
        self._is_exact = activations == FLOAT32_ACTIVATIONS
        self._quantized: dict[str, dict[str, int]] = {}
        self._sizes: dict[str, int] = {}
        self._multiplied: set[str] = set()
        self._widened: set[str] = set()
        self._constants: set[str] = set()

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> list[str]:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return [name]

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def node(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], domain: str = "", **settings: Any
    ) -> str:
        """Add a node; return its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], domain=domain, **settings))
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer, unless there is one of that name; return the name."""
        if name not in self._constants:
            self._constants.add(name)
            self._initializer(name, value.shape, value)
        return name

    def add_and_norm(
        self,
        x: str,
        change: str,
        weight: str,
        vector: Callable[[str], NDArray[np.float32]],
        config: ModelConfig,
        place: str,
    ) -> tuple[str, str]:
        """Add ``change`` to the residual stream; return the stream and its RMSNorm."""
        self.constant(weight, vector(weight))
        if not change:
            self.node(
                "SimplifiedLayerNormalization", [x, weight], place + "/normed", axis=-1, epsilon=config.rms_norm_eps
            )
            return x, place + "/normed"
        outputs = [place + "/normed", "", "", place + "/x"]
        self.node(
            "SkipSimplifiedLayerNormalization",
            [x, change, weight],
            outputs,
            domain=_CONTRIB,
            epsilon=config.rms_norm_eps,
        )
        return place + "/x", place + "/normed"

    def quantized(self, name: str, parts: Sequence[Matrix], long_blocks: bool = False) -> None:
        """Store matrices, one below the other, as codes and float16 scales.

        With ``long_blocks`` 8-bit codes are rounded anew in blocks of 128, where rows allow it: ONNX Runtime keeps three
        float32 numbers for each block.
        """
        rows, kind = _join(parts)
        blocks = unpack(rows, kind)
        if kind is Q8_0 and long_blocks and rows.shape[1] % (kind.bytes * _LONG_BLOCK // BLOCK) == 0:
            blocks = _in_long_blocks(blocks)
        count, groups, block = blocks.codes_rgk.shape
        if kind is Q8_0:
            packed = blocks.codes_rgk.view(np.uint8) ^ 128  # zero point 128
        else:
            packed = blocks.codes_rgk[..., 0::2] | blocks.codes_rgk[..., 1::2] << 4
        self._initializer(f"{name}/codes", packed.shape, packed)
        self._initializer(f"{name}/scales_half", (count, groups), blocks.scale_rg)
        bits = 8 if kind is Q8_0 else 4
        self._sizes[name] = packed.nbytes + blocks.scale_rg.nbytes
        self._quantized[name] = {"N": count, "K": groups * block, "bits": bits, "block_size": block}

    def look_up(self, name: str, ids: str, is_head: bool) -> str:
        """Look rows of a quantized matrix up; return them as float32. With ``is_head`` it is multiplied by, too."""
        shape = self._quantized[name]
        table = self._view(f"{name}/codes", f"{name}/rows", [shape["N"], shape["K"] * shape["bits"] // 8], is_head)
        settings = {"bits": shape["bits"], "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        if is_head or self._is_exact:
            inputs = [table, ids, self._scales(name)]
            return self.node("GatherBlockQuantized", inputs, f"{name}/x", domain=_CONTRIB, **settings)
        # Numbers rounded to float16, but no table of float32 scales in memory for the few rows that are looked up.
        inputs = [table, ids, f"{name}/scales_half"]
        self.node("GatherBlockQuantized", inputs, f"{name}/x_half", domain=_CONTRIB, **settings)
        return self.node("Cast", [f"{name}/x_half"], f"{name}/x", to=TensorProto.FLOAT)

    def product(
        self, x: str, name: str, parts: Sequence[str], matrix: Callable[[str], Matrix], out: str | None = None
    ) -> str:
        """Multiply by the matrices ``parts``, joined and stored as ``name`` when they are met first; return the product."""
        if name not in self._quantized:
            is_head = parts == ["lm_head"]
            self.quantized(name, [matrix(f"{part}.weight") for part in parts], is_head and not self._is_exact)
        if name not in self._multiplied:
            self._multiplied.add(name)
            self.multiplied += self._sizes[name]
        settings = self._quantized[name] | {"accuracy_level": self._activations}
        inputs = [x, f"{name}/codes", self._scales(name)]
        return self.node("MatMulNBits", inputs, out or f"{name}/of/{x}", domain=_CONTRIB, **settings)

    def _scales(self, name: str) -> str:
        """Return float32 scales: a node that the runtime folds away when it loads the file."""
        if name not in self._widened:
            self._widened.add(name)
            self.node("Cast", [f"{name}/scales_half"], f"{name}/scales", to=TensorProto.FLOAT)
        return f"{name}/scales"

    def _initializer(self, name: str, shape: Sequence[int], value: NDArray[Any]) -> None:
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=shape)
        raw = np.ascontiguousarray(value).tobytes()
        self.bytes += len(raw)
        if len(raw) <= _INLINE_BYTES:
            tensor.raw_data = raw
            self.initializers.append(tensor)
            return
        self._data.write(bytes(-self._data.tell() % _PAGE))
        place = {"location": DATA_FILE, "offset": self._data.tell(), "length": len(raw)}
        self._data.write(raw)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def _view(self, stored: str, name: str, shape: Sequence[int], keep: bool) -> str:
        """Give an initializer another name and shape; with ``keep``, beside those it has: the bytes are stored once."""
        tensor = next(tensor for tensor in self.initializers if tensor.name == stored)
        if keep:
            self.initializers.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
            tensor = self.initializers[-1]
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(shape)
        return name


def _in_long_blocks(blocks: Blocks) -> Blocks:
    """Return 8-bit codes rounded anew, 128 numbers to a scale."""
    values_rgk = blocks.codes_rgk * blocks.scale_rg[..., None].astype(np.float32)
    values_rgk = values_rgk.reshape(len(values_rgk), -1, _LONG_BLOCK)
    scale_rg = (np.abs(values_rgk).max(axis=-1) / np.float32(127)).astype(np.float16)
    divisor_rg1 = np.where(scale_rg == 0, np.float16(1), scale_rg)[..., None].astype(np.float32)
    return Blocks(np.rint(values_rgk / divisor_rg1).clip(-127, 127).astype(np.int8), scale_rg)


def _join(parts: Sequence[Matrix]) -> Matrix:
    """Return matrices as one; where encodings differ, all become Q8_0."""
    kinds = {kind for _, kind in parts}
    if kinds <= {Q4_0} or kinds <= {Q8_0}:
        return np.concatenate([rows for rows, _ in parts]), parts[0][1]
    widened = [rows if kind is Q8_0 else encode(decode(rows, kind), Q8_0) for rows, kind in parts]
    return np.concatenate(widened), Q8_0
