"""Requests decoded together: one thread owns the engine and feeds it once a step.

A request waits in a queue until a slot is free and keeps it until it ends. What any slot holds of its prompt is not computed
again: if that slot is not free, its keys and values are copied. A prompt that begins like one that is being read waits for it,
so that several answers to one prompt, or questions behind one system message, read it once. A step feeds each slot its next
token, and at most ``CHUNK`` tokens of prompts that are still being read, so that a long prompt delays the others little.

Who asked is told of the first token at once, and then of all tokens that came within ``TOGETHER`` seconds at a time: a small
model draws one every millisecond, and telling of it costs a tenth of that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobillama.data.tokenizer import Tokenizer
from mobillama.engine.interface import BatchEngine
from mobillama.engine.sampling import Sampling, log_probabilities, sample
from mobillama.engine.stream import shared_length
from mobillama.errors import DivergedError, MobiLlamaError
from mobillama.serve.metrics import Metrics
from mobillama.serve.writer import Writer

CHUNK = 256
TOGETHER = 0.03
WORTH = 32  # tokens for which a request waits until another has read them
STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"


class Busy(MobiLlamaError):
    """The queue is full."""


@dataclass(frozen=True)
class LogProbability:
    """How likely a token was, before any sampling option."""

    token: int
    value: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their values."""


class Piece(NamedTuple):
    """What one token adds to an answer."""

    text: str
    """May be empty: the token completes no character, or may begin a stop text."""
    token: int
    log_probability: LogProbability | None


class Finish(NamedTuple):
    """The end of an answer."""

    reason: str
    """One of STOP, LENGTH, CANCELLED, FAILED."""
    text: str = ""
    """What was held back."""


@dataclass(frozen=True)
class Request:
    """One answer to compute."""

    ids: Sequence[int]
    """The prompt; with ``max_tokens`` it fits the context but for the last token."""
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int]
    stops: tuple[str, ...] = ()
    seed: int | None = None
    """Of the draws; None: another one each time."""
    log_probabilities: int | None = None
    """How many of the likeliest tokens to tell of; None: tell of none, not even the token itself."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken in."""

    request: Request
    emit: Callable[[list[Piece | Finish]], None]
    """Called with what came since the last call; a finish is the last there is."""
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False


class _Running:
    """A request in a slot."""

    def __init__(self, ticket: Ticket, slot: int, held: int, token_bytes: Sequence[bytes]) -> None:
        self.ticket, self.slot, self.fed = ticket, slot, held
        self.ids = list(ticket.request.ids)
        self.random = np.random.default_rng(ticket.request.seed)
        self.writer = Writer(token_bytes, ticket.request.stops)
        self.untold: list[Piece | Finish] = []
        self.is_urgent = False  # whether what is untold is told at once: the first token, or the end

    @property
    def reads(self) -> bool:
        """Whether the prompt is still being read."""
        return self.fed < len(self.ticket.request.ids)

    @property
    def waits_for_one(self) -> bool:
        """Whether one token is left to feed: the last of the prompt, or the last of the answer so far."""
        return len(self.ids) - self.fed == 1


class Scheduler:
    """Runs requests on an engine, from :meth:`start` to :meth:`close`.

    Args:
        engine: no one else uses it.
        tokenizer: the model's.
        queue: requests that may wait beside those in slots.
        metrics: counts what happens.
        post: calls a function in the thread where requests are told of what came; absent: the scheduler's own.
    """

    def __init__(
        self,
        engine: BatchEngine,
        tokenizer: Tokenizer,
        queue: int,
        metrics: Metrics,
        post: Callable[[Callable[[], None]], object] = lambda function: function(),
    ) -> None:
        self._engine, self._token_bytes, self._metrics = engine, tokenizer.token_bytes, metrics
        self._limit, self._post = queue, post
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Running] = []
        self._held: list[list[int]] = [[] for _ in range(engine.slots)]
        self._used = [0] * engine.slots  # the step in which a slot was last given away
        self._told = 0.0  # when all who asked were told last
        self._changed = threading.Condition()
        self._closed = self._is_asked = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, requests: Sequence[tuple[Request, Callable[[list[Piece | Finish]], None]]]) -> list[Ticket]:
        """Take in requests, all or none.

        Raises:
            Busy: the queue has no room for them, or the scheduler is closed.
        """
        tickets = [Ticket(request, emit) for request, emit in requests]
        with self._changed:
            free = self._engine.slots - len(self._running)
            if self._closed or len(self._waiting) + len(tickets) > self._limit + free:
                raise Busy(f"{len(self._waiting)} requests wait already; try again later")
            self._waiting += tickets
            self._is_asked = True
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """End a request, whose slot is free after the step that is being computed."""
        with self._changed:
            ticket.cancelled = True
            self._is_asked = True
            self._changed.notify()

    def close(self) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._closed = True
            self._is_asked = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def _run(self) -> None:
        while self._goes_on():
            if self._running:
                self._step()

    def _goes_on(self) -> bool:
        """Take notice of what was asked for since the last step; return whether the scheduler is still open."""
        if self._running and not self._is_asked:  # between two tokens no lock: each line here runs with cold caches
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            self._is_asked, closed = False, self._closed
            if closed:
                ended = [*(running.ticket for running in self._running), *self._waiting]
                self._running, self._waiting = [], deque()
            else:
                ended = self._drop_cancelled()
                self._admit()
        self._tell([(ticket, [Finish(CANCELLED)]) for ticket in ended])
        return not closed

    def _drop_cancelled(self) -> list[Ticket]:
        ended = [ticket for ticket in self._waiting if ticket.cancelled]
        ended += [running.ticket for running in self._running if running.ticket.cancelled]
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        self._running = [running for running in self._running if not running.ticket.cancelled]
        return ended

    def _admit(self) -> None:
        free = set(range(self._engine.slots)) - {running.slot for running in self._running}
        for ticket in list(self._waiting):
            if not free:
                return
            ids = ticket.request.ids
            held = [shared_length(its, ids) for its in self._held]
            kept = min(max(held), len(ids) - 1)
            if any(running.reads and shared_length(running.ids, ids) >= kept + WORTH for running in self._running):
                self._is_asked = True  # look again after the next step
                continue
            self._waiting.remove(ticket)
            # A slot that loses nothing rather than one that holds more, then one without a copy, then the one longest unused.
            slot = min(free, key=lambda at: (len(self._held[at]) > held[at], held[at] < kept, self._used[at]))
            free.remove(slot)
            if held[slot] < kept:
                kept = self._copied(held.index(max(held)), slot, kept)
            self._engine.truncate(slot, kept)
            self._held[slot] = list(ids[:kept])
            self._used[slot] = self._metrics.steps + 1
            self._metrics.count_prompt(len(ids), kept)
            self._running.append(_Running(ticket, slot, kept, self._token_bytes))

    def _copied(self, source: int, target: int, length: int) -> int:
        """Copy what a slot holds to another; return how much that other holds: nothing if the engine fails."""
        try:
            self._engine.copy(source, target, length)
        except Exception as error:  # as in a step; the prompt is read anew
            self._metrics.count_failure(error)
            return 0
        return length

    def _step(self) -> None:
        started, budget = time.monotonic(), CHUNK
        fed: list[tuple[_Running, list[int]]] = []
        for running in self._running:
            if running.waits_for_one:
                fed.append((running, running.ids[-1:]))
            elif budget:
                stretch = running.ids[running.fed : running.fed + budget]
                budget -= len(stretch)
                fed.append((running, stretch))
        if budget < CHUNK:  # a step that reads prompts takes long
            self._tell_of(running for running, _ in fed)
        try:
            logits_wv = self._engine.feed([(running.slot, ids) for running, ids in fed])
        except Exception as error:  # whatever an engine raises, the server goes on with the next requests
            self._fail(error)
            return
        now = time.monotonic()
        took, is_urgent = now - started, False
        self._metrics.count_step(took)
        for (running, ids), logits_v in zip(fed, logits_wv, strict=True):
            running.fed += len(ids)
            self._held[running.slot] += ids
            if running.fed == len(running.ids):
                try:
                    self._take(running, logits_v)
                except DivergedError as error:
                    self._fail(error)
                    return
                is_urgent |= running.is_urgent
        if now + took > self._told + TOGETHER:  # the next step would end too late
            self._told = now
            self._tell_of(running for running, _ in fed)
        elif is_urgent:
            self._tell_of(running for running, _ in fed if running.is_urgent)

    def _tell_of(self, some: Iterable[_Running]) -> None:
        news = []
        for running in some:
            if running.untold:
                news.append((running.ticket, running.untold))
                running.untold = []
        self._tell(news)

    def _tell(self, news: list[tuple[Ticket, list[Piece | Finish]]]) -> None:
        """Tell of all at once: to wake another thread takes longer than to draw a token."""

        def emit() -> None:
            for ticket, events in news:
                ticket.emit(events)

        if news:
            self._post(emit)

    def _take(self, running: _Running, logits_v: NDArray[np.float32]) -> None:
        """Draw a request's next token, tell of it, and end the request where it ends."""
        request = running.ticket.request
        token = sample(logits_v, request.sampling, running.random, running.ids)
        said = len(running.ids) - len(request.ids) + 1
        running.is_urgent = said == 1
        if said == 1:
            self._metrics.count_first(time.monotonic() - running.ticket.arrived)
        if token in request.stop_ids:
            self._end(running, STOP)
            return
        running.ids.append(token)
        self._metrics.generated_tokens += 1
        known = request.log_probabilities
        told = None if known is None else _log_probability(logits_v, token, known)
        running.untold.append(Piece(running.writer.write(token), token, told))
        if running.writer.stopped:
            self._end(running, STOP)
        elif said == request.max_tokens:
            self._end(running, LENGTH)

    def _end(self, running: _Running, reason: str) -> None:
        with self._changed:
            self._running.remove(running)
            self._is_asked = True  # its slot is free
        running.is_urgent = True
        rest = running.writer.finish()
        running.untold.append(Finish(STOP if running.writer.stopped else reason, rest))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            failed, self._running = self._running, []
            self._is_asked = True
        self._metrics.count_failure(error)
        for running in failed:
            self._engine.truncate(running.slot, 0)
            self._held[running.slot] = []
            running.untold.append(Finish(FAILED))
        self._tell_of(failed)


def _log_probability(logits_v: NDArray[np.float32], token: int, top: int) -> LogProbability:
    values_v = log_probabilities(logits_v)
    likeliest = np.argpartition(values_v, -top)[-top:] if top else np.empty(0, int)
    ranked = likeliest[np.argsort(-values_v[likeliest], kind="stable")]
    return LogProbability(token, float(values_v[token]), [(int(i), float(values_v[i])) for i in ranked])
