"""The terminal chat: turns in the model's own template, decoded on one key/value cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobillama.data.template import check_messages
from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.interface import Engine
from mobillama.engine.sampling import Sampling
from mobillama.engine.stream import Session, stream_tokens, text_of
from mobillama.errors import CorruptDataError, MobiLlamaError, UsageError
from mobillama.record.files import read_json, write_json
from mobillama.serve.turns import Continuation, turns_of

HELP = """\
/reset        forget the conversation
/save FILE    write it as JSON
/load FILE    go on with one that was saved
/stats        tokens, speed, how full the context is
/help         this
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer"""


@dataclass
class Answer:
    """What the last answer took."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    """Of the prompt; the others were held from the turns before."""
    tokens: int = 0
    first_seconds: float = 0.0
    """Until the first token."""
    seconds: float = 0.0
    dropped_turns: int = 0
    """Oldest messages that no longer fit."""

    @property
    def speed(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.seconds - self.first_seconds) if self.tokens > 1 else 0.0


class Conversation:
    """A conversation: with a chat template, or with a model that was only pre-trained and continues what you type.

    Args:
        engine: decodes; what stays of the conversation is not computed again.
        tokenizer: the model's, with its template.
        sampling: how tokens are drawn.
        max_tokens: longest answer.
        seed: of the draws.
        system: what the model is told first; empty: what the template says by itself.
        lookup: tokens guessed at a time: see :func:`mobillama.engine.stream.stream_tokens`.

    Raises:
        UsageError: the template is none, or breaks a limit.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_tokens: int,
        seed: int,
        system: str = "",
        lookup: int = 0,
    ) -> None:
        self._session, self._tokenizer, self._turns = Session(engine), tokenizer, turns_of(tokenizer)
        self._sampling, self._max_tokens, self._lookup = sampling, max_tokens, lookup
        self._random = np.random.default_rng(seed)
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.engine_name, self.context_length = engine.name, engine.context_length
        self._room = engine.context_length - min(max_tokens, engine.context_length // 2)
        self.last = Answer()

    @property
    def has_template(self) -> bool:
        """Whether the model was tuned to answer."""
        return not isinstance(self._turns, Continuation)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the pieces of the answer to ``text``; oldest turns that no longer fit are dropped whole and counted.

        An answer that is broken off stays as far as it came.

        Raises:
            UsageError: ``text`` alone is too long, or the template refuses it; it is forgotten.
        """
        started, self.last = time.perf_counter(), Answer()
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting_ids()
        except UsageError:
            self.messages.pop()
            raise
        self.last.prompt_tokens, self.last.computed_tokens = len(ids), len(ids) - self._session.shared(ids)
        pieces: list[str] = []
        try:
            for piece in text_of(self._tokens(ids, started), self._tokenizer):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages, self.last = [], Answer()

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, the system's message included.

        Raises:
            UsageError: nothing was said yet, or something else is there.
            OSError: it cannot be written.
        """
        if not self.messages:
            raise UsageError("nothing was said yet")
        if path.exists():
            try:
                _saved_messages(path)
            except MobiLlamaError:
                raise UsageError(f"{path}: is there already and holds no conversation; take another name") from None
        write_json(path, {"messages": [*self._system, *self.messages]})

    def load(self, path: Path) -> None:
        """Go on with a saved conversation.

        Raises:
            UsageError: the file holds none; what was there stays.
        """
        messages = _saved_messages(path)
        first = 1 if messages[0]["role"] == "system" else 0
        self._system, self.messages, self.last = messages[:first], messages[first:], Answer()

    def _tokens(self, ids: list[int], started: float) -> Iterator[int]:
        stop_ids = self._turns.stop_ids
        try:
            for token in stream_tokens(
                self._session, ids, stop_ids, self._sampling, self._max_tokens, self._random, self._lookup
            ):
                self.last.tokens += 1
                if self.last.tokens == 1:
                    self.last.first_seconds = time.perf_counter() - started
                yield token
        finally:
            self.last.seconds = time.perf_counter() - started

    def _fitting_ids(self) -> list[int]:
        messages = self.messages
        while True:
            ids = self._turns.encode([*self._system, *messages], add_generation_prompt=True).ids
            if len(ids) <= self._room:
                self.last.dropped_turns = len(self.messages) - len(messages)
                self.messages = messages
                return ids
            if len(messages) == 1:
                raise UsageError(
                    f"that is {len(ids)} tokens; {self._room} fit a context of {self.context_length} and leave room to "
                    "answer; shorten it"
                )
            # A turn is what was asked and what was answered; the last message is the question at hand.
            messages = messages[next(n for n in range(1, len(messages)) if messages[n]["role"] == "user") :]


def _saved_messages(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        messages = read_json(path).get("messages")
    except CorruptDataError:
        raise UsageError(f"{path}: is no JSON, so no conversation that was saved") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError(f"{path}: holds no list of messages")
    try:
        check_messages(messages)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return messages


def chat(
    conversation: Conversation, read: Callable[[], str], write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Talk until ``read`` raises EOFError; ``write`` receives an answer's text as it comes, ``note`` lines about it."""
    if not conversation.has_template:
        note("This model was pre-trained only, or came without its chat template: it continues what you type.")
    note("/help lists what else you can type; Ctrl-D leaves.")
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit leaves")
            continue
        if text in ("/exit", "/quit"):
            return
        if text.startswith("/"):
            _command(conversation, *text.partition(" ")[::2], note)
        elif text:
            _show_answer(conversation, text, write, note)


def _command(conversation: Conversation, name: str, argument: str, note: Callable[[str], None]) -> None:
    try:
        if name == "/reset":
            conversation.reset()
            note("forgotten")
        elif name in ("/save", "/load") and not argument.strip():
            note(f"{name} FILE: name the file")
        elif name == "/save":
            conversation.save(Path(argument.strip()).expanduser())
            note(f"{len(conversation.messages)} messages saved")
        elif name == "/load":
            conversation.load(Path(argument.strip()).expanduser())
            note(f"{len(conversation.messages)} messages loaded")
        elif name == "/stats":
            note(_stats(conversation))
        else:
            note(HELP if name == "/help" else f"{name}: no such command\n{HELP}")
    except MobiLlamaError as error:
        note(str(error))
    except OSError as error:
        note(f"{argument.strip()}: {error.strerror or error}")


def _stats(conversation: Conversation) -> str:
    last = conversation.last
    held = last.prompt_tokens + last.tokens
    facts: dict[str, Any] = {
        "engine": conversation.engine_name,
        "messages": len(conversation.messages),
        "context": f"{held} of {conversation.context_length} tokens",
        "last prompt": f"{last.prompt_tokens} tokens, {last.computed_tokens} of them computed",
        "last answer": f"{last.tokens} tokens, {last.speed:.1f} a second, the first after {last.first_seconds:.2f} s",
    }
    return "\n".join(f"{name:12}{value}" for name, value in facts.items())


def _show_answer(
    conversation: Conversation, text: str, write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    with contextlib.closing(conversation.answer(text)) as pieces:
        try:
            for piece in pieces:
                write(piece)
        except UsageError as error:
            note(f"{error}\n")
            return
        except KeyboardInterrupt:
            write(" …")
    last = conversation.last
    dropped = f" · {last.dropped_turns} oldest messages no longer fit and were dropped" if last.dropped_turns else ""
    speed = f"{last.tokens} tokens · {last.speed:.1f} a second · the first after {last.first_seconds:.2f} s"
    note(f"\n{speed}{dropped}\n")
