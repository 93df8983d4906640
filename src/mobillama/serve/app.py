"""The routes: OpenAI's API, health, metrics, the page and a run's records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mobillama.serve import answers, protocol
from mobillama.serve import scheduler as scheduling
from mobillama.serve.answers import Answers
from mobillama.serve.metrics import Metrics
from mobillama.serve.protocol import Options, RequestError, checked
from mobillama.serve.run_records import run_summary
from mobillama.serve.scheduler import Busy, Finish, Piece, Scheduler
from mobillama.serve.served import Served

PAGE = Path(__file__).with_name("page")
MOST_BODY = 1 << 20
MOST_READ = 16 << 20  # of a larger body, so that its sender sees the answer and not a connection that breaks
BODY_SECONDS, SEND_SECONDS, PING_SECONDS = 20.0, 60.0, 10.0


@dataclass
class State:
    """What the routes share."""

    metrics: Metrics = field(default_factory=Metrics)
    served: Served | None = None
    """The model; None while it is loading."""
    scheduler: Scheduler | None = None
    run: Path | None = None
    """A run directory to report on."""

    def ready(self) -> tuple[Served, Scheduler]:
        """Return the model and what runs it.

        Raises:
            RequestError: it is still loading.
        """
        if self.served is None or self.scheduler is None:
            raise RequestError(
                "the model is loading", status=503, code="loading", kind="server_error", headers={"Retry-After": "2"}
            )
        return self.served, self.scheduler


def make_app(state: State, lifespan: Callable[[Any], Any] | None = None) -> Starlette:
    """Return the application; ``state`` is filled when the model is there."""
    handlers: dict[Any, Any] = {
        RequestError: _say,
        HTTPException: _say_http,
        ClientDisconnect: _say_nothing,
        Exception: _say_failure,
    }
    app = Starlette(
        routes=[
            Route("/health", _health),
            Route("/metrics", _metrics),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/v1/chat/completions", _chat, methods=["POST"]),
            Route("/v1/completions", _complete, methods=["POST"]),
            Route("/run", _run),
            Route("/run/report.html", _report),
            *(Route(path, _file(name), name=name) for path, name in _FILES.items()),
        ],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.state.its = state
    return app


_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}


async def _chat(request: Request) -> Response:
    served, _ = _state(request).ready()

    def understand(body: bytes) -> tuple[Options, list[int]]:
        asked = protocol.parse_chat(protocol.read_body(body), served.name)
        ids = checked(lambda: served.turns.encode(asked.messages, add_generation_prompt=True).ids, "messages")
        return asked.options, ids

    options, ids = await asyncio.to_thread(understand, await _body(request))
    return await _answer(request, [ids], options, served.turns.stop_ids, is_chat=True)


async def _complete(request: Request) -> Response:
    served, _ = _state(request).ready()

    def understand(body: bytes) -> tuple[Options, list[list[int]]]:
        asked = protocol.parse_completion(protocol.read_body(body), served.name)
        prompts = [its if isinstance(its, list) else served.tokenizer.encode([its])[0] for its in asked.prompts]
        if not all(0 <= token < served.engine.vocab_size for prompt in prompts for token in prompt):
            raise RequestError(f"prompt: the model knows the ids 0…{served.engine.vocab_size - 1}", "prompt")
        return asked.options, prompts

    options, prompts = await asyncio.to_thread(understand, await _body(request))
    return await _answer(request, prompts, options, frozenset({served.tokenizer.eos_id}), is_chat=False)


async def _answer(
    request: Request, prompts: Sequence[list[int]], options: Options, stop_ids: frozenset[int], is_chat: bool
) -> Response:
    served, scheduler = _state(request).ready()
    context = served.engine.context_length
    longest = max(map(len, prompts))
    if longest + (options.max_tokens or 1) > context:
        answer = f" and max_tokens of {options.max_tokens}" if options.max_tokens and longest < context else ""
        raise RequestError(
            f"This model's maximum context length is {context} tokens. Your prompt has {longest} tokens{answer}: together "
            f"{longest + (options.max_tokens or 1)} or more.",
            "messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    requests = [
        scheduling.Request(
            ids=prompt,
            sampling=options.sampling,
            max_tokens=options.max_tokens or context - len(prompt),
            stop_ids=stop_ids,
            stops=options.stops,
            seed=None if options.seed is None else (options.seed + number) % 2**63,
            log_probabilities=options.log_probabilities,
        )
        for prompt in prompts
        for number in range(options.choices)
    ]
    exchange = Exchange(scheduler, requests)
    made = Answers(
        served.name, served.digest, served.tokenizer.token_bytes, sum(map(len, prompts)), len(requests), is_chat
    )
    if options.stream:
        return _EventStream(exchange, _events(exchange, made, options.include_usage))
    return await _whole(request, exchange, made)


class Exchange:
    """Requests at the scheduler, and what comes back, in asyncio's world.

    Raises:
        RequestError: the queue is full.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[scheduling.Request]) -> None:
        self._scheduler, self._open = scheduler, set(range(len(requests)))
        self._come: list[tuple[int, list[Piece | Finish]]] = []
        self._has_come = asyncio.Event()

        try:
            self._tickets = scheduler.submit([(its, partial(self._take, index)) for index, its in enumerate(requests)])
        except Busy as error:
            raise RequestError(
                str(error), status=429, code="queue_full", kind="rate_limit_error", headers={"Retry-After": "1"}
            ) from None

    def _take(self, index: int, events: list[Piece | Finish]) -> None:
        self._come.append((index, events))
        self._has_come.set()

    @property
    def is_taken(self) -> bool:
        """Whether nothing has come since :meth:`next` returned last."""
        return not self._has_come.is_set()

    def wake(self) -> None:
        """Let :meth:`next` return, with nothing if nothing has come."""
        self._has_come.set()

    async def next(self) -> list[tuple[int, list[Piece | Finish]]]:
        """Return what has come since of each answer; at least one of them is open.

        Raises:
            RequestError: the engine failed, or the server stops.
        """
        await self._has_come.wait()
        self._has_come.clear()
        come, self._come = self._come, []
        for index, events in come:
            if isinstance(end := events[-1], Finish):
                self._open.discard(index)
                if end.reason == scheduling.FAILED:
                    raise RequestError("the engine failed", status=500, kind="server_error")
                if end.reason == scheduling.CANCELLED:
                    raise RequestError("the server stops", status=503, kind="server_error")
        return come

    @property
    def is_open(self) -> bool:
        """Whether an answer has not ended."""
        return bool(self._open)

    def close(self) -> None:
        """End what has not ended."""
        for index in self._open:
            self._scheduler.cancel(self._tickets[index])
        self._open = set()


async def _whole(request: Request, exchange: Exchange, made: Answers) -> Response:
    async def collect() -> None:
        while exchange.is_open:
            for index, events in await exchange.next():
                made.take(index, events)

    collecting = asyncio.create_task(collect())
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientDisconnect
        await collecting
    finally:
        exchange.close()
        collecting.cancel()
        leaving.cancel()
    return JSONResponse(made.whole())


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(exchange: Exchange, made: Answers, include_usage: bool) -> AsyncIterator[bytes]:
    text = made.opening()  # goes with the first token
    try:
        while exchange.is_open:
            come = await exchange.next()
            for index, events in come:
                made.take(index, events)
                text += made.event(index, events)
            if not come:
                yield answers.PING
            elif text and exchange.is_open:
                yield text
                text = b""
    except RequestError as error:
        yield text + answers.error_event(error.body())
        return
    yield text + (made.usage_event() if include_usage else b"") + answers.DONE


class _EventStream(StreamingResponse):
    """Server-sent events, to a client that reads them; slots are freed whatever ends the stream."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS) as limit:
                ticking = asyncio.create_task(self._tick(limit))
                await super().__call__(scope, receive, send)
        except TimeoutError:  # a client that stopped reading: uvicorn closes what was not finished
            pass
        finally:
            ticking.cancel()
            self._exchange.close()

    async def _tick(self, limit: asyncio.Timeout) -> None:
        """Now and then send a ping, and give the client time anew if it read; a timer for each event would cost more."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            if self._exchange.is_taken:
                limit.reschedule(asyncio.get_running_loop().time() + SEND_SECONDS)
            self._exchange.wake()


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which pages of other sites cannot send without asking first
        raise RequestError("Content-Type: is not application/json", status=415)
    stated = request.headers.get("content-length", "0")
    size = int(stated) if stated.isdecimal() else 0
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if size <= MOST_READ:
                size = 0
                async for part in request.stream():
                    size += len(part)
                    if size <= MOST_BODY:
                        parts.append(part)
                    if size > MOST_READ:
                        break
    except TimeoutError:
        raise RequestError(f"the body did not come within {BODY_SECONDS:.0f} s", status=408) from None
    if size > MOST_BODY:
        raise RequestError(f"the body is larger than {MOST_BODY:,} bytes", status=413)
    return b"".join(parts)


async def _health(request: Request) -> Response:
    state = _state(request)
    if state.served is None:
        return JSONResponse({"status": "loading"}, 503, {"Retry-After": "2"})
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request) -> Response:
    state = _state(request)
    load = state.scheduler.load if state.scheduler else (0, 0)
    return PlainTextResponse(state.metrics.text(*load), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _models(request: Request) -> Response:
    served, _ = _state(request).ready()
    return JSONResponse({"object": "list", "data": [served.facts()]})


async def _model(request: Request) -> Response:
    served, _ = _state(request).ready()
    name = request.path_params["name"]
    if name != served.name:
        raise RequestError(
            f"'{name[:80]}' is not served here; '{served.name}' is", "model", status=404, code="model_not_found"
        )
    return JSONResponse(served.facts())


async def _run(request: Request) -> Response:
    run = _state(request).run
    if run is None:
        raise RequestError("no run directory is served; give one with --run", status=404)
    return JSONResponse(await asyncio.to_thread(run_summary, run))


async def _report(request: Request) -> Response:
    run = _state(request).run
    if run is None or not (run / "report.html").is_file():
        raise RequestError("there is no report.html in a served run directory", status=404)
    # A report brings styles and scripts of its own: it gets an origin of its own, from which it reaches nothing here.
    policy = "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return FileResponse(run / "report.html", headers={"Cache-Control": "no-store", "Content-Security-Policy": policy})


def _file(name: str) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return answer


def _state(request: Request) -> State:
    its: State = request.app.state.its
    return its


async def _say(request: Request, error: RequestError) -> Response:
    closing = {"Connection": "close"} if error.status in (408, 413, 415) else {}
    return JSONResponse(error.body(), error.status, {**closing, **error.headers})


async def _say_http(request: Request, error: HTTPException) -> Response:
    return await _say(
        request, RequestError(f"{request.method} {request.url.path[:80]}: {error.detail}", status=error.status_code)
    )


async def _say_nothing(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # no one reads it; the metrics count it


async def _say_failure(request: Request, error: Exception) -> Response:
    return await _say(request, RequestError("the server failed; its log says how", status=500, kind="server_error"))
