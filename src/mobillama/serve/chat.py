"""A plain terminal chat: the conversation is one growing text, decoded on one key/value cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.interface import Engine
from mobillama.engine.sampling import Sampling
from mobillama.engine.stream import Session, stream_tokens, text_of
from mobillama.errors import UsageError

HELP = "/reset forgets the conversation · /help shows this · /exit or Ctrl-D leaves · Ctrl-C stops an answer"


class Conversation:
    """A conversation with a model that was only pre-trained: it continues what you type, turn after turn.

    Args:
        engine: decodes; what stays of the conversation is not computed again.
        tokenizer: the model's.
        sampling: how tokens are drawn.
        max_tokens: longest answer.
        seed: of the draws.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, max_tokens: int, seed: int) -> None:
        self._session, self._tokenizer = Session(engine), tokenizer
        self._sampling, self._max_tokens = sampling, max_tokens
        self._random = np.random.default_rng(seed)
        self._turns: list[list[int]] = []
        self._room = engine.context_length - min(max_tokens, engine.context_length // 2)
        self.dropped_turns = 0

    def answer(self, text: str) -> Iterator[str]:
        """Yield the pieces of the answer to ``text``; oldest turns that no longer fit are dropped whole and counted.

        Raises:
            UsageError: ``text`` alone is too long; it is forgotten.
        """
        (ids,) = self._tokenizer.encode(["\n" + text if self._turns else text])
        if len(ids) > self._room:
            context = self._session.engine.context_length
            raise UsageError(
                f"that is {len(ids)} tokens; {self._room} fit a context of {context} and leave room to answer; shorten it"
            )
        self._turns += [ids, []]
        yield from text_of(self._answer_tokens(), self._tokenizer)

    def reset(self) -> None:
        """Forget the conversation."""
        self._turns.clear()

    def _answer_tokens(self) -> Iterator[int]:
        ids, eos_id = self._fitting_ids(), self._tokenizer.eos_id
        for token in stream_tokens(self._session, ids, eos_id, self._sampling, self._max_tokens, self._random):
            self._turns[-1].append(token)
            yield token

    def _fitting_ids(self) -> list[int]:
        self.dropped_turns = 0
        while sum(map(len, self._turns)) > self._room:
            del self._turns[:2]
            self.dropped_turns += 2
        return list(itertools.chain(*self._turns))


def chat(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Talk until ``read`` raises EOFError; ``write`` receives text as it comes."""
    write(f"This model was pre-trained only: it continues what you type. {HELP}\n")
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            write("\n(Ctrl-D or /exit leaves)\n")
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            write("(forgotten)\n")
        elif text.startswith("/"):
            write(f"{HELP}\n")
        elif text:
            _show_answer(conversation, text, write)


def _show_answer(conversation: Conversation, text: str, write: Callable[[str], None]) -> None:
    started, pieces = time.perf_counter(), 0
    try:
        for piece in conversation.answer(text):
            write(piece)
            pieces += 1
    except UsageError as error:
        write(f"({error})\n\n")
        return
    except KeyboardInterrupt:
        write(" …")
    tokens = max(0, pieces - 1)  # the last piece only completes the text
    speed = f"{tokens} tokens, {tokens / (time.perf_counter() - started):.1f} a second with reading the prompt"
    dropped = f"; {conversation.dropped_turns} oldest turns no longer fit and were dropped"
    write(f"\n({speed}{dropped if conversation.dropped_turns else ''})\n\n")
