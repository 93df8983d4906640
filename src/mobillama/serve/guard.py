"""What every request passes before it is answered: name of the host, origin, token; and limits on time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mobillama.serve.metrics import Metrics
from mobillama.serve.protocol import RequestError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEAD_SECONDS = 10.0  # for a connection to send the head of a request
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/run", "/")
OPEN_PATHS = ("/", "/health", "/page.css", "/page.js")  # answered without a token: they tell nothing of the model
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Wraps the application.

    Args:
        app: what answers.
        token: which requests must bear; empty: none.
        hosts: names that requests may call this server by, beside addresses and localhost. A page elsewhere whose name was
            made to point here (DNS rebinding) calls it by its own.
        origins: of pages elsewhere that may call this server; their preflights are answered.
        metrics: counts what is answered.
    """

    def __init__(self, app: App, token: str, hosts: Sequence[str], origins: Sequence[str], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._token = token.encode()
        self._hosts = {host.lower() for host in hosts} | {"localhost"}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then let the application answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin", "")
        added = dict(_HEADERS)
        if origin in self._origins:
            added |= {
                "Access-Control-Allow-Origin": origin,
                "Vary": "Origin",
                "Cross-Origin-Resource-Policy": "cross-origin",
            }

        async def send_on(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                has = {name.lower() for name, _ in given}
                own = ((name.lower().encode(), value.encode("latin-1")) for name, value in added.items())
                message["headers"] = given + [(name, value) for name, value in own if name not in has]
                # Of all other paths one count is kept, or a scan would make the metrics grow without end.
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._metrics.requests[path, message["status"]] += 1
            await send(message)

        try:
            self._check(scope, headers, origin)
        except RequestError as error:
            await send_error(error, send_on)
            return
        if scope["method"] == "OPTIONS" and origin in self._origins:
            added |= {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            }
            await _answer(204, b"", {}, send_on)
            return
        await self._app(scope, receive, send_on)

    def _check(self, scope: Scope, headers: dict[str, str], origin: str) -> None:
        host = headers.get("host", "")
        if not self._is_known(host):
            raise RequestError(f"Host: '{host[:80]}' is no name of this server (see --allow-host)", status=421)
        own = origin.partition("://")[2].lower() == host.lower()
        if origin and not own and origin not in self._origins:
            raise RequestError("Origin: pages of other sites may not call this server (see --allow-origin)", status=403)
        if not self._token or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        if kind.lower() != "bearer" or not right:
            raise RequestError(
                "Authorization: bears no token, or a wrong one",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_known(self, host: str) -> bool:
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def send_error(error: RequestError, send: Send) -> None:
    """Answer with an error object; the connection closes, since the rest of the request is not read."""
    headers = {"Content-Type": "application/json", "Connection": "close", **error.headers}
    await _answer(error.status, json.dumps(error.body()).encode(), headers, send)


async def _answer(status: int, content: bytes, headers: dict[str, str], send: Send) -> None:
    headers = headers | {"Content-Length": str(len(content))} if content else headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which gives a connection ``HEAD_SECONDS`` for the head of each request."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take in data; between requests the clock runs from the first byte of a head."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()
        elif self._deadline is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
