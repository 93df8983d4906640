"""The server's life: bind, load while it already answers ``/health``, serve, shut down."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from mobillama.errors import UsageError
from mobillama.serve.app import State, make_app
from mobillama.serve.guard import Connection, Guard
from mobillama.serve.scheduler import Scheduler
from mobillama.serve.served import Served

MOST_CONNECTIONS = 1024
MOST_HEAD = 16 << 10  # bytes of a request's head
_BACKLOG = 256
DRAIN_SECONDS = 10  # for answers under way when the server is told to stop
LEAVE_SECONDS = 5  # for clients to read that the rest does not come


@dataclass(frozen=True)
class Listen:
    """Where to listen, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    allow_hosts: Sequence[str] = ()
    allow_origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse to be open to everyone.

        Raises:
            UsageError: the host is beyond this machine and there is no token, or the token is too short.
        """
        if not self.token and not _is_loopback(self.host):
            raise UsageError(
                f"--host: {self.host} can be reached from other machines; give a secret with --token-file, which clients "
                "send as 'Authorization: Bearer …'"
            )
        if self.token and (len(self.token) < 16 or not self.token.isascii() or not self.token.isprintable()):
            raise UsageError(
                "--token-file: give at least 16 printable ASCII characters, such as 'openssl rand -hex 32' makes"
            )


def serve(
    listen: Listen, load: Callable[[], Served], queue: int, run: Path | None = None, say: Callable[[str], None] = print
) -> None:
    """Serve until a signal comes.

    Args:
        listen: where.
        load: opens the model; called in a thread of its own while the server already listens.
        queue: requests that may wait beside those in slots.
        run: a run directory to report on.
        say: told where the server listens, and when the model is there.

    Raises:
        UsageError: the address is not to be had, or what ``load`` raises.
    """
    state = State(run=run)
    failure: list[Exception] = []

    async def open_model() -> None:
        try:
            served = await asyncio.to_thread(load)
            post = asyncio.get_running_loop().call_soon_threadsafe
            state.scheduler = Scheduler(served.engine, served.tokenizer, queue, state.metrics, post)
            state.scheduler.start()
            state.served = served
            at_once = f"{served.engine.slots} requests at once" if served.engine.slots > 1 else "one request at a time"
            say(f"{served.name} is ready: {served.engine.name}, {at_once}")
        except Exception as error:  # told after the server has stopped
            failure.append(error)
            server.should_exit = True

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        opening = asyncio.create_task(open_model())
        yield
        opening.cancel()
        if state.scheduler:
            await asyncio.to_thread(state.scheduler.close)

    guarded = Guard(make_app(state, lifespan), listen.token, listen.allow_hosts, listen.allow_origins, state.metrics)
    server = _Server(
        state,
        say,
        uvicorn.Config(
            guarded,
            http=Connection,
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MOST_HEAD,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=DRAIN_SECONDS + LEAVE_SECONDS,
        ),
    )
    with _bound(listen) as bound:
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"listening on http://{shown}:{port} (the page, and OpenAI's API under /v1); Ctrl-C stops")
        server.run(sockets=[bound])
    if failure:
        raise failure[0]


class _Server(uvicorn.Server):
    """Stops at a signal: answers under way have a while to end, or until a second signal; then an error ends them."""

    def __init__(self, state: State, say: Callable[[str], None], config: uvicorn.Config) -> None:
        super().__init__(config)
        self._state, self._say, self._hurries = state, say, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take note of a signal."""
        if self.should_exit and not self._hurries:
            self._hurries = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections."""
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        if self._state.scheduler and any(self._state.scheduler.load):
            self._say(f"stopping; answers under way have {DRAIN_SECONDS:g} s to end; once more stops at once")
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and not self._hurries:
            await asyncio.sleep(0.1)
        if self._state.scheduler:
            await asyncio.to_thread(self._state.scheduler.close)


def _bound(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((listen.host, listen.port))
        made.listen(_BACKLOG)  # whoever reads the address may connect at once
    except (OSError, OverflowError) as error:
        made.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"--host, --port: cannot listen on {listen.host}:{listen.port} ({reason}); take another"
        ) from None
    return made


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
