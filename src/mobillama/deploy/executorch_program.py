"""The program that ExecuTorch runs: the decoder over a cache of its own, lowered to XNNPACK, and read again.

Products of matrices go to XNNPACK; attention over the cache and the table of embeddings are operators of ExecuTorch's own
(``custom_ops`` and ``quantized``), which its LLM runners hold. What the method takes and what the program states beside it
(``get_max_context_len`` …) are those runners' convention.

Shapes: b batch, which is 1 · t tokens · h heads · d head width · c channels · o rows of a matrix · g groups of a row.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mobillama.engine.blocks import Q4_0, unpack
from mobillama.engine.weights import EMBEDDING, HEAD
from mobillama.model.attention import Attention
from mobillama.model.linear import COMPUTE_TYPE, Linear
from mobillama.model.rotary import rotary_tables, rotate
from mobillama.model.transformer import MobiLlama
from mobillama.recipe import ModelConfig

MOST_TOKENS = 256  # of one call; runners cut a longer prompt into pieces
_LEAST_SCALE = 1e-30  # XNNPACK takes no scale of zero, which rows of zeros would have


@dataclass(frozen=True)
class Rounded:
    """A matrix of whole numbers that share scales along rows: a number is ``scale · code``."""

    codes_oc: Tensor
    """int8; of 4-bit matrices within -8…7."""
    scale_og: Tensor
    """float32."""
    bits: int

    @classmethod
    def of_blocks(cls, rows: NDArray[np.uint8]) -> Rounded:
        """Take over the bytes of a Q4_0 matrix."""
        blocks = unpack(rows, Q4_0)
        codes_oc = torch.from_numpy(blocks.codes_rgk.astype(np.int8).reshape(len(rows), -1)) - 8
        return cls(codes_oc, torch.from_numpy(blocks.scale_rg.astype(np.float32)), 4)

    @classmethod
    def by_row(cls, weight_oc: Tensor) -> Rounded:
        """Round each row of a matrix to eight bits, to nearest, with a scale of its own."""
        weight_oc = weight_oc.float()
        scale_og = weight_oc.abs().amax(1, keepdim=True).clamp(min=_LEAST_SCALE) / 127
        return cls((weight_oc / scale_og).round().to(torch.int8), scale_og, 8)

    def with_positive_scales(self) -> Rounded:
        """Return what XNNPACK's groups can hold, whose scales are positive and in bfloat16.

        Where a scale is negative, as Q4_0's are in half of all blocks, codes change sign, 8 becomes 7, and the scale is taken
        that fits the new codes best.
        """
        scale_og1 = self.scale_og[..., None]
        codes_ogk = self.codes_oc.view(*self.scale_og.shape, -1).float() * torch.where(scale_og1 < 0, -1, 1)
        held_ogk = codes_ogk.clamp(max=7)
        fit_og1 = (codes_ogk * held_ogk).sum(-1, keepdim=True) / held_ogk.square().sum(-1, keepdim=True).clamp(min=1)
        scale_og1 = (scale_og1.abs() * torch.where(scale_og1 < 0, fit_og1, 1)).clamp(min=_LEAST_SCALE)
        return Rounded(held_ogk.flatten(1).to(torch.int8), scale_og1[..., 0].bfloat16().float(), self.bits)

    def numbers(self) -> Tensor:
        """Return the numbers (o, c) in float32."""
        rows, groups = self.scale_og.shape
        return (self.codes_oc.view(rows, groups, -1) * self.scale_og[..., None]).view(rows, -1)

    def product_weight(self) -> Tensor:
        """Return the weight that rounds what it is multiplied with to eight bits, a scale for each token."""
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
            IntxUnpackedToInt8Tensor,
            IntxUnpackedToInt8TensorActivationQuantization,
        )

        group = self.codes_oc.shape[1] // self.scale_og.shape[1]
        return IntxUnpackedToInt8Tensor(
            self.codes_oc,
            self.scale_og,
            torch.zeros_like(self.scale_og, dtype=torch.int8),
            getattr(torch, f"int{self.bits}"),
            (1, group),
            torch.float32,
            IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
        )


class _Table(nn.Module):
    """Embeddings from rounded rows, decoded where they are looked up."""

    def __init__(self, rounded: Rounded) -> None:
        super().__init__()
        codes_oc, self.four = rounded.codes_oc, rounded.bits == 4
        if self.four:
            codes_oc = (codes_oc + 8).view(torch.uint8)
            codes_oc = codes_oc[:, ::2] << 4 | codes_oc[:, 1::2]
        self.register_buffer("codes", codes_oc)
        self.register_buffer("scales", rounded.scale_og)

    def forward(self, ids_bt: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        if self.four:
            return operators.embedding_4bit.dtype(self.codes, self.scales, None, -8, 7, ids_bt, dtype=torch.float32)
        return operators.embedding_byte.dtype(self.codes, self.scales, None, -128, 127, ids_bt, dtype=torch.float32)


class _Program(nn.Module):
    """The method ``forward``: ids (1, t) and the position of the first (1) to the logits (1, v) that follow the last."""

    def __init__(self, shape: ModelConfig, weights: Mapping[str, Tensor | Rounded]) -> None:
        super().__init__()
        with torch.device("meta"):
            model = MobiLlama(shape)
        for name, weight in {HEAD: weights[EMBEDDING], **weights}.items():
            held = weight.product_weight() if isinstance(weight, Rounded) else weight
            model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(held, requires_grad=False)
        if isinstance(table := weights[EMBEDDING], Rounded):
            model.model.embed_tokens = _Table(table)  # type: ignore[assignment]
        self.model, self.shape = model, shape
        places = (1, shape.max_position_embeddings, shape.key_value_heads, shape.attention_head_dim)
        for layer in range(shape.num_hidden_layers):
            self.register_buffer(f"keys_{layer}", torch.zeros(places))
            self.register_buffer(f"values_{layer}", torch.zeros(places))

    def forward(self, ids_bt: Tensor, first: Tensor) -> Tensor:
        decoder: Any = self.model.model
        start: Any = first[0].item()
        torch._check(start >= 0)
        torch._check(start + ids_bt.shape[1] <= self.shape.max_position_embeddings)
        positions_bt = (first + torch.arange(ids_bt.shape[1]))[None]
        rotary = rotary_tables(positions_bt, self.shape.attention_head_dim, self.shape.rope_theta)
        x_btc = decoder.embed_tokens(ids_bt)
        for index, (layer, ffn) in enumerate(decoder.layer_weights):
            block, network = decoder.layers[layer], decoder.ffns[ffn]
            x_btc = x_btc + self._attend(block.self_attn, block.input_layernorm(x_btc), rotary, start, index)
            y_btc = block.post_attention_layernorm(x_btc)
            gate, up = F.linear(y_btc, network.gate_proj.weight), F.linear(y_btc, network.up_proj.weight)
            x_btc = x_btc + F.linear(F.silu(gate) * up, network.down_proj.weight)
        return F.linear(decoder.norm(x_btc[:, -1]), self.model.lm_head.weight)

    def _attend(
        self, attention: Attention, x_btc: Tensor, rotary: tuple[Tensor, Tensor], start: int, index: int
    ) -> Tensor:
        q_bthd, k_bthd, v_bthd = (
            F.linear(x_btc, part.weight).unflatten(2, (-1, self.shape.attention_head_dim))
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.qk_norm:
            q_bthd, k_bthd = attention.q_norm(q_bthd), attention.k_norm(k_bthd)
        keys, values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
        operators = torch.ops.llama
        operators.update_cache(rotate(k_bthd, *rotary), keys, start)
        operators.update_cache(v_bthd, values, start)
        y_bthd = operators.custom_sdpa(rotate(q_bthd, *rotary), keys, values, start, None, 0.0, True)
        return F.linear(y_bthd.flatten(2), attention.o_proj.weight)


def round_activations(model: MobiLlama) -> None:
    """Make a model's products round what they multiply to eight bits as XNNPACK does: a scale and a zero for each token."""
    products = dataclasses.replace(COMPUTE_TYPE, output=lambda x_ni, weight_oi: _eight_bits(x_ni) @ weight_oi.T)
    for module in model.modules():
        if isinstance(module, Linear):
            module.products = products


def _eight_bits(x_ni: Tensor) -> Tensor:
    least_n1, most_n1 = x_ni.amin(1, keepdim=True).clamp(max=0), x_ni.amax(1, keepdim=True).clamp(min=0)
    steps_n1 = 255 / (most_n1 - least_n1).clamp(min=_LEAST_SCALE)
    zero_n1 = (-128 - least_n1 * steps_n1).round()
    codes_ni = ((x_ni * steps_n1).round() + zero_n1).clamp(-128, 127)
    return (codes_ni - zero_n1) / steps_n1


def load_operators() -> None:
    """Make the operators of ExecuTorch that a program has known to torch and to the runtime.

    Raises:
        ModuleNotFoundError: ExecuTorch is not installed.
    """
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401


def write_program(
    path: Path, shape: ModelConfig, weights: Mapping[str, Tensor | Rounded], facts: Mapping[str, Any]
) -> None:
    """Write a model as a program of ExecuTorch, for XNNPACK.

    Args:
        path: the ``.pte`` file.
        shape: of the model; the cache has a place for each of ``max_position_embeddings``.
        weights: by name; what layers share stands once, in the model and in the file.
        facts: what the program states beside its shape, by the names of constant methods.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    load_operators()
    context = shape.max_position_embeddings
    most = min(context, MOST_TOKENS)
    example = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tokens = torch.export.Dim("tokens", min=1, max=most)
    with path.open("wb") as file, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what both libraries will change in themselves
        exported = torch.export.export(
            _Program(shape, weights).eval(), example, dynamic_shapes=({1: tokens}, None), strict=False
        )
        stated = {
            "get_max_seq_len": most,
            "get_max_context_len": context,
            "get_n_layers": shape.num_hidden_layers,
            "get_vocab_size": shape.vocab_size,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
            **facts,
        }
        lowered = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=stated,
        )
        program = lowered.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
        program.write_to_file(file)


class Program:
    """A program in ExecuTorch's runtime."""

    def __init__(self, path: Path) -> None:
        from executorch.runtime import Runtime

        load_operators()
        self._method = Runtime.get().load_program(path).load_method("forward")

    def feed(self, ids: Sequence[int], first: int) -> NDArray[np.float32]:
        """Return the logits (v) that follow ids whose first stands at a position; earlier ones are in the cache."""
        (logits,) = self._method.execute([torch.tensor([list(ids)]), torch.tensor([first])])
        return logits[0].numpy().copy()
