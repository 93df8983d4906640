"""The harness's model interface on top of prefix trees: ``lm_eval.simple_evaluate(model=PackedLM(...))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import resolve_max_length

from mobillama.evaluate.encode import TextTokenizer, Truncated, encode, to_sequences
from mobillama.evaluate.scorer import Scorer

PACKED_UP_TO = 2048  # tokens; how masks are taken is tried out at this length


class PackedLM(LM):
    """Scores requests as ``HFLM`` does, but computes what they share once, and logits only where something is scored.

    Args:
        model: a transformers causal language model with weights in float32.
        tokenizer: its tokenizer.
        precision: ``float32`` or ``bfloat16``.
        batch_tokens: tokens through the model at once; 0: as suits the device.
        progress: told (requests done, all requests).

    Attributes:
        tokens: how many tokens went through the model, padding included.
        truncated: what of the latest requests did not fit the model's context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TextTokenizer,
        precision: str = "float32",
        batch_tokens: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self._tokenizer, self._progress = tokenizer, progress
        self.context_length = resolve_max_length(model.config, tokenizer.tokenizer)
        self.truncated = Truncated(0, 0)
        self._scorer = Scorer(model, precision, min(self.context_length, PACKED_UP_TO), batch_tokens)

    @property
    def tokens(self) -> int:
        """How many tokens went through the model, padding included."""
        return self._scorer.tokens

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation behind its context, and whether it is the likeliest."""
        contexts, continuations = zip(*[request.args for request in requests], strict=True)
        return self._score(list(contexts), list(continuations), rolling=False)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probability of each text, in windows of the model's context."""
        texts = [request.args[0] for request in requests]
        return [logprob for logprob, _ in self._score([""] * len(texts), texts, rolling=True)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Refuse: no suite of ours lets models write."""
        raise NotImplementedError("PackedLM scores given texts; use the harness's HFLM for tasks that generate")

    def _score(self, contexts: list[str], continuations: list[str], rolling: bool) -> list[tuple[float, bool]]:
        encoded = encode(self._tokenizer, contexts, continuations, rolling)
        sequences, request_of, self.truncated = to_sequences(encoded, self.context_length)
        logprobs, greedy = [0.0] * len(contexts), [True] * len(contexts)
        done = 0
        for scores in self._scorer.score(sequences):
            for score in scores:
                logprobs[request_of[score.sequence]] += score.logprob
                greedy[request_of[score.sequence]] &= score.is_greedy
            done += len(scores)
            self._progress(done, len(sequences))
        return list(zip(logprobs, greedy, strict=True))
