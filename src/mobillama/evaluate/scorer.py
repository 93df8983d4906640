"""Log-probabilities from any causal language model: prefix trees in, logits computed only where something is predicted.

A model is asked for a whole attention mask (b, 1, t, s) and for positions, as transformers hands both through to most
architectures. Whether this one heeds both is measured at the longest sequence it is to read, not looked up: if a packed
sequence does not come out as it does alone, the model reads one sequence a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobillama.errors import DivergedError, UsageError
from mobillama.evaluate.tree import Batch, Sequence, batches, pack
from mobillama.model.linear import Linear

ROW_TOKENS = 1024
# Logits held in float32 at once, in numbers.
_CHUNK = 1 << 28
# Weights of a head in float32 at once, in numbers.
_HEAD_PIECE = 1 << 22


@dataclass(frozen=True)
class Score:
    """What a model says of one sequence's scored tokens."""

    sequence: int
    logprob: float
    """Sum over them, in nats."""
    is_greedy: bool
    """Whether each was the likeliest."""


class Scorer:
    """Scores sequences with a transformers model in evaluation mode.

    Args:
        model: a causal language model, its weights in float32; see ``precision``.
        precision: what the model is cast to, once it is known how it takes masks: ``float32``, ``float64`` or ``bfloat16``.
            With the last, the logits of a head that is one matrix are in float32 even so: in bfloat16 those between 16 and
            32 would be multiples of 1/8, and the choices of many a question equal.
        longest: sequences up to so many tokens are packed; longer ones are read one a row.
        batch_tokens: tokens through the model at once; 0: as suits the device.
        packs: whether rows hold trees; None: if the model heeds our masks, which is then found out.

    Attributes:
        packs: whether rows hold trees.
        tokens: how many tokens went through the model, padding included.
        batch_tokens: halved whenever memory did not hold a batch.
    """

    def __init__(
        self, model: Any, precision: str, longest: int, batch_tokens: int = 0, packs: bool | None = None
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or (32768 if self.device.type == "cuda" else 2048)
        self.tokens = 0
        self._longest = longest
        self._outputs_m: Tensor | None = None
        # The head sees only what is predicted from, whatever stands around it: scaling or capping of logits still applies.
        self._head = model.get_output_embeddings()
        self._head.register_forward_pre_hook(self._keep_outputs)
        self.packs = self._heeds_mask_and_positions(longest) if packs is None else packs
        if precision == "float64":
            model.double()
        if precision == "bfloat16":  # buffers, of rotary frequencies say, stay in float32
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            if type(self._head) in (nn.Linear, Linear):  # what others do besides is theirs to know
                self._head.forward = self._multiply_in_float32

    def score(self, sequences: list[Sequence]) -> Iterator[list[Score]]:
        """Yield scores batch by batch, longest rows first; each sequence once.

        Raises:
            UsageError: memory does not hold one row.
        """
        packs = self.packs and max((len(sequence.inputs) for sequence in sequences), default=0) <= self._longest
        rows = pack(sequences, ROW_TOKENS, packs)
        waiting: Callable[[], list[Score]] | None = None
        while rows:
            batch = next(batches(rows, self.batch_tokens))
            count = len(batch.ids_bt)
            try:
                launched = self._launch(batch, packs)
            except torch.OutOfMemoryError:
                if count == 1:
                    raise UsageError(
                        f"memory does not hold a row of {batch.tokens:,} tokens; free {self.device}, or use another --device"
                    ) from None
                self.batch_tokens = batch.tokens // 2
                continue
            rows = rows[count:]
            if waiting is not None:
                yield waiting()  # while the device computes the next batch
            waiting = launched
        if waiting is not None:
            yield waiting()

    @torch.inference_mode()
    def _launch(self, batch: Batch, packs: bool) -> Callable[[], list[Score]]:
        """Start computing a batch; what is returned waits for its scores."""
        logits_mv = self._logits(batch, packs)
        self.tokens += batch.tokens
        output_n, targets_n = (self._tensor(part).long() for part in (batch.output_n, batch.targets_n))
        totals, likeliest = [], []
        for part_mv in logits_mv.split(max(1, _CHUNK // logits_mv.shape[1])):
            totals.append(_wide(part_mv).logsumexp(1))
            likeliest.append(part_mv.argmax(1))
        total_m, likeliest_m = torch.cat(totals), torch.cat(likeliest)
        logprobs_n = _wide(logits_mv[output_n, targets_n]) - total_m[output_n]
        hits_n = likeliest_m[output_n] == targets_n

        def collect() -> list[Score]:
            starts = np.flatnonzero(np.diff(batch.sequences_n, prepend=-1))
            sums = np.add.reduceat(logprobs_n.double().cpu().numpy(), starts)
            greedy = np.logical_and.reduceat(hits_n.cpu().numpy(), starts)
            names = batch.sequences_n[starts]
            return [Score(*facts) for facts in zip(names.tolist(), sums.tolist(), greedy.tolist(), strict=True)]

        return collect

    @torch.inference_mode()
    def _heeds_mask_and_positions(self, longest: int) -> bool:
        """Tell whether a sequence of ``longest`` tokens comes out as it does alone behind all else that a row may hold.

        The row is as long as rows get, in branches of half a sequence, so that the windows of local attention would fall on
        the wrong tokens. It is compared in the model's float32, in which rounding and a wrong mask are far apart.

        Raises:
            DivergedError: the model's logits are not finite, which says nothing of its architecture.
        """
        half = max(1, longest // 2)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        branches = min(2 * max(ROW_TOKENS, longest) // half - 1, vocabulary)
        ids = np.random.default_rng(0).integers(0, vocabulary, (1 + branches, half), dtype=np.int32)
        ids[1:, 0] = np.arange(vocabulary - branches, vocabulary)  # they differ from their first token on
        tree = [Sequence(np.concatenate([ids[0], branch, branch[:1]]), half) for branch in ids[1:]]
        outputs = []
        for sequences, packs in ((tree, True), (tree[-1:], False)):
            (batch,) = batches(pack(sequences, ids.size), 1)
            try:
                outputs.append(self._logits(batch, packs)[-half:].float())
            except Exception:
                if not packs:
                    raise
                return False  # what a model makes of arguments that it does not know: it is read without them
        packed, alone = outputs
        if not alone.isfinite().all():
            raise DivergedError("gives logits that are not finite; evaluate an earlier checkpoint")
        spread = alone - alone.mean(1, keepdim=True)
        return bool((packed - alone).square().mean() < 1e-6 * spread.square().mean())

    def _logits(self, batch: Batch, packs: bool) -> Tensor:
        """Return the logits (m, vocabulary) of a batch's needed outputs."""
        inputs: dict[str, Tensor] = {"input_ids": self._tensor(batch.ids_bt).long()}
        if packs:
            dtype = next(self.model.parameters()).dtype
            inputs |= {
                "attention_mask": tree_mask(self._tensor(batch.ends_bt), dtype),
                "position_ids": self._tensor(batch.positions_bt).long(),
            }
        self._outputs_m = self._tensor(batch.outputs_m)
        try:
            return self.model(**inputs, use_cache=False).logits[0]
        finally:
            self._outputs_m = None

    def _keep_outputs(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._outputs_m is None:
            return None
        hidden_btc, *rest = inputs
        return (hidden_btc.flatten(0, 1)[self._outputs_m][None], *rest)

    def _multiply_in_float32(self, hidden_bmc: Tensor) -> Tensor:
        if self._outputs_m is None:  # not asked by us
            return type(self._head).forward(self._head, hidden_bmc)
        return multiply_in_float32(hidden_bmc[0], self._head.weight, self._head.bias)[None]

    def _tensor(self, array: NDArray[np.int32]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def multiply_in_float32(x_mc: Tensor, weight_vc: Tensor, bias_v: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` (m, v) in float32, of inputs in bfloat16, without a copy of the whole weight."""
    if x_mc.is_cuda:
        y_mv = torch.mm(x_mc, weight_vc.T, out_dtype=torch.float32)
    else:
        y_mv = x_mc.new_empty(len(x_mc), len(weight_vc), dtype=torch.float32)
        rows, x_mc = max(1, _HEAD_PIECE // weight_vc.shape[1]), x_mc.float()
        for part_mv, part_vc in zip(y_mv.split(rows, dim=1), weight_vc.split(rows), strict=True):
            torch.mm(x_mc, part_vc.float().T, out=part_mv)
    return y_mv if bias_v is None else y_mv.add_(bias_v)


def tree_mask(ends_bt: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask (b, 1, t, s) that is added to attention's scores: 0 where a token may look, else the least number."""
    place = torch.arange(ends_bt.shape[1], device=ends_bt.device)
    visible_bts = (place[None, :] <= place[:, None]) & (place[:, None] < ends_bt[:, None, :])
    mask_bts = torch.full_like(visible_bts, torch.finfo(dtype).min, dtype=dtype)
    return mask_bts.masked_fill_(visible_bts, 0)[:, None]
