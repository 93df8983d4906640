"""Calibrated quantization of a whole model whose layers may share their networks.

Matrices are quantized one after another, each for the inputs that it gets from what is quantized already. Those with the same
input (queries, keys and values; gate and up) go together. A matrix of one layer is quantized when the walk through the layers
comes to it. A shared one is met once in every layer, with inputs of another kind each time: its Hessian is the sum over all its
uses, and it is quantized once, when all have been seen.

Layers that use one network are a *segment*; a model that shares nothing has segments of one layer. Within a segment attention
comes first, layer by layer, on a network that is still whole; then the network's inputs are summed over the segment's layers.
A last walk carries the residual stream behind the segment.

Shapes: b sequences of a batch · t tokens · c channels · n tokens of a batch · i inputs of a matrix · o its outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobillama.compress.gptq import quantize_matrix
from mobillama.engine.blocks import Blocks, BlockType, decode, pack
from mobillama.errors import UsageError
from mobillama.model.attention import attention_mask
from mobillama.model.rotary import rotary_tables
from mobillama.model.swiglu import swiglu
from mobillama.model.transformer import MobiLlama

ATTENTION = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
NETWORK = (("gate_proj", "up_proj"), ("down_proj",))
_ATTEND, _FEED = False, True


@dataclass(frozen=True)
class _Walk:
    """A walk of the residual stream through halves of layers, what it watches, and what becomes of it."""

    halves: list[tuple[bool, int]]
    """Attention or network, of which layer."""
    watched: Sequence[nn.Linear] = ()
    """Matrices with the same input, quantized afterwards."""
    from_start: bool = False
    """Begin where the segment began, not where the stream stands."""
    moves: bool = False
    """The stream stands behind it afterwards."""
    counted: Collection[int] | None = None
    """Layers whose inputs are watched; None: all."""


class Hessian:
    """The sum of XᵀX over inputs (…, i) of a matrix, in float32."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_ii = torch.zeros(inputs, inputs, device=device)

    def add(self, x: Tensor) -> None:
        """Take in inputs."""
        x_ni = x.flatten(0, -2).float()
        self.sum_ii.addmm_(x_ni.T, x_ni)


class Calibration:
    """A model on its way through calibrated quantization.

    Args:
        model: in float32; its matrices are exchanged for what their codes stand for.
        ids_bt: batches of real text, all of one length.
        kinds: of the weights to quantize, by name.
        uses: the layers whose inputs a network is quantized for; None: all that use it. Only experiments want fewer.
        network_first: quantize a segment's network before its attention; for experiments too.
        show: told the halves of layers walked through so far, and of all.
    """

    def __init__(
        self,
        model: MobiLlama,
        ids_bt: Sequence[Tensor],
        kinds: Mapping[str, BlockType],
        uses: Collection[int] | None = None,
        network_first: bool = False,
        show: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.model, self.ids_bt, self.kinds, self.show = model, ids_bt, kinds, show
        self.uses, self.network_first = uses, network_first
        self.blocks: dict[str, Blocks] = {}
        shape, device, tokens = model.model.shape, ids_bt[0].device, ids_bt[0].shape[1]
        positions_1t = torch.arange(tokens, device=device)[None]
        self._rotary = rotary_tables(positions_1t, shape.attention_head_dim, shape.rope_theta)
        self._mask = attention_mask(tokens, tokens, None, None, device)
        self._layer = 0  # that the stream is in

    @torch.no_grad()
    def run(self) -> dict[str, Blocks]:
        """Quantize; return the codes of each weight by its name."""
        table = self.model.model.embed_tokens
        if self._name(table) in self.kinds:
            self._quantize([table], None)
        stream = [table(ids_bt) for ids_bt in self.ids_bt]
        segments = [list(self._walks(layers)) for layers in self._segments()]
        segments[-1].pop()  # nobody asks what stands behind the last layer
        total, done = sum(len(walk.halves) for segment in segments for walk in segment), 0
        for segment in segments:
            start = stream
            for walk in segment:
                hessian = Hessian(walk.watched[0].in_features, stream[0].device) if walk.watched else None
                end = list(start if walk.from_start else stream)
                with self._watching(walk, hessian):
                    for half in walk.halves:
                        self._pass(end, *half)
                        done += 1
                        self.show(done, total)
                if hessian is not None:
                    self._quantize(walk.watched, hessian.sum_ii)
                if walk.moves:
                    stream = end
        return self.blocks

    def _segments(self) -> Iterator[list[int]]:
        weights = self.model.model.layer_weights
        for _, layers in itertools.groupby(range(len(weights)), key=lambda layer: weights[layer][1]):
            yield list(layers)

    def _walks(self, layers: list[int]) -> Iterator[_Walk]:
        """Yield the walks through a segment."""
        weights, modules = self.model.model.layer_weights, self.model.model
        whole = [(half, layer) for layer in layers for half in (_ATTEND, _FEED)]
        network = modules.ffns[weights[layers[0]][1]]
        on_network = [_Walk(whole, self._named(network, part), from_start=True, counted=self.uses) for part in NETWORK]
        if self.network_first:
            yield from on_network
        for block, group in itertools.groupby(layers, key=lambda layer: weights[layer][0]):
            using = list(group)
            halves = whole if len(using) > 1 else [(_ATTEND, using[0])]
            yield from (_Walk(halves, self._named(modules.layers[block].self_attn, part)) for part in ATTENTION)
            if using[-1] != layers[-1]:
                yield _Walk([(_ATTEND, using[0]), (_FEED, using[0])], moves=True)
        if not self.network_first:
            yield from on_network
        yield _Walk(whole, from_start=True, moves=True)

    def _named(self, parent: nn.Module, part: Sequence[str]) -> list[Any]:
        """Return the matrices of a part that are to be quantized."""
        linears = [getattr(parent, name) for name in part]
        return [linear for linear in linears if self._name(linear) in self.kinds]

    def _name(self, module: nn.Module) -> str:
        return next(f"{name}.weight" for name, other in self.model.named_modules() if other is module)

    def _pass(self, stream: list[Tensor], feed: bool, layer: int) -> None:
        """Carry the stream (b, t, c), batch after batch in place, through one half of a layer."""
        self._layer = layer
        block, ffn = self.model.model.layer_weights[layer]
        own: Any
        own, network = self.model.model.layers[block], self.model.model.ffns[ffn]
        for number, x_btc in enumerate(stream):
            if feed:
                stream[number] = x_btc + network(own.post_attention_layernorm(x_btc))
            else:
                normed_btc = own.input_layernorm(x_btc)
                stream[number] = x_btc + own.self_attn(normed_btc, self._rotary, *self._mask, None, layer)

    @contextmanager
    def _watching(self, walk: _Walk, hessian: Hessian | None) -> Iterator[None]:
        """Add what comes into the first watched matrix to its Hessian."""
        if hessian is None:
            yield
            return

        def see(module: nn.Module, args: tuple[Tensor], named: dict[str, Any]) -> None:
            if walk.counted is None or self._layer in walk.counted:
                hessian.add(swiglu(args[0]) if named.get("gated") else args[0])

        hook = walk.watched[0].register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _quantize(self, modules: Sequence[nn.Linear | nn.Embedding], hessian_ii: Tensor | None) -> None:
        """Exchange matrices that have the same input for their rounded selves."""
        kind = self.kinds[self._name(modules[0])]
        try:
            blocks = quantize_matrix(torch.cat([module.weight for module in modules]), hessian_ii, kind)
        except UsageError as error:
            raise UsageError(f"{self._name(modules[0])}: {error}") from None
        start = 0
        for module in modules:
            rows = slice(start, start := start + len(module.weight))
            minimum = None if blocks.minimum_rg is None else blocks.minimum_rg[rows]
            own = Blocks(blocks.codes_rgk[rows], blocks.scale_rg[rows], minimum)
            rounded = torch.from_numpy(decode(pack(own, kind), kind))
            # A parameter of its own: what was there may be the caller's.
            module.weight = nn.Parameter(rounded.to(module.weight.device), requires_grad=False)
            self.blocks[self._name(module)] = own
