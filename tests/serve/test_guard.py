"""Who may call the server, and what it bears: on loopback, while a model loads that never comes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading

import pytest
import uvicorn

from conftest import run_cli
from mobillama.serve import app, guard
from mobillama.serve.answers import Answers
from mobillama.serve.app import State, make_app
from mobillama.serve.guard import Connection, Guard
from mobillama.serve.metrics import Metrics

TOKEN = "0123456789abcdef-secret"


@contextlib.contextmanager
def guarded(token="", hosts=(), origins=()):
    """Serve in a thread; yield the port."""
    state = State()
    application = Guard(make_app(state), token, hosts, origins, state.metrics)
    config = uvicorn.Config(
        application, http=Connection, lifespan="off", log_level="error", h11_max_incomplete_event_size=16384
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


def ask(port, path="/v1/models", method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_while_the_model_loads_health_and_answers_are_503():
    with guarded() as port:
        assert ask(port, "/health")[0] == 503
        status, headers, content = ask(port)
        assert status == 503 and headers["Retry-After"] and json.loads(content)["error"]["code"] == "loading"
        assert ask(port, "/metrics")[0] == 200


@pytest.mark.parametrize(
    "host, known",
    [
        *((name, True) for name in ("localhost", "127.0.0.1:8000", "[::1]:80", "10.0.0.7", "my.name:80")),
        *((name, False) for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "")),
    ],
)
def test_names_of_other_hosts_are_refused(host, known):
    with guarded(hosts=["my.name"]) as port:
        assert (ask(port, "/health", Host=host)[0] == 421) is not known


def test_pages_of_other_sites_may_not_call_unless_they_are_named():
    with guarded(origins=["https://good.example"]) as port:
        status, headers, _ = ask(port, "/health", Origin="https://evil.example")
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
        assert ask(port, "/health", Origin="null")[0] == 403
        assert ask(port, "/health", Origin=f"http://127.0.0.1:{port}")[0] == 503
        preflight = {"Access_Control_Request_Method": "POST"}
        assert ask(port, "/v1/chat/completions", "OPTIONS", Origin="https://evil.example", **preflight)[0] == 403
        status, headers, _ = ask(port, "/v1/chat/completions", "OPTIONS", Origin="https://good.example", **preflight)
        assert status == 204 and headers["Access-Control-Allow-Origin"] == "https://good.example"


def test_a_token_is_asked_for_and_compared():
    with guarded(TOKEN) as port:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer \xe9"},
        ):
            status, headers, content = ask(port, **given)
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
            assert json.loads(content)["error"]["code"] == "invalid_api_key"
        assert ask(port, Authorization=f"Bearer {TOKEN}")[0] == 503
        assert ask(port, "/metrics")[0] == 401 and ask(port, "/run")[0] == 401
        assert ask(port, "/")[0] == 200 and ask(port, "/health")[0] == 503


def test_the_page_runs_only_what_came_with_it():
    with guarded() as port:
        for path in ("/", "/page.js", "/page.css"):
            status, headers, content = ask(port, path)
            assert status == 200 and len(content) > 100
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
        page = ask(port, "/")[2].decode()
        assert "http://" not in page and "https://" not in page and "<script>" not in page and " style=" not in page


def raw(port, *parts, wait=0.0):
    """Send bytes with pauses; return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        received = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.settimeout(20)
                connection.sendall(part)
                connection.settimeout(wait or 0.001)
                with contextlib.suppress(TimeoutError):
                    received += connection.recv(65536)
            connection.settimeout(20)
            while data := connection.recv(65536):
                received += data
        return received


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def ready(monkeypatch):
    """Let bodies be read though no model is there."""
    monkeypatch.setattr(State, "ready", lambda self: (type("Served", (), {"name": "m"})(), None))


def test_a_head_that_never_ends_is_cut_off(monkeypatch):
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    with guarded() as port:
        assert raw(port) == b""
        assert raw(port, *[b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 8], wait=0.1) == b""
        first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        again = raw(port, first, *[b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 8], wait=0.1)
        assert again.count(b"HTTP/1.1 ") == 1  # the second head came too slowly
        assert ask(port, "/health")[0] == 503


def test_a_body_that_never_ends_is_cut_off(monkeypatch):
    ready(monkeypatch)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    with guarded() as port:
        answer = raw(port, HEAD + b"Content-Length: 90\r\n\r\n", *[b"{"] * 8, wait=0.1)
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()


def test_heads_and_bodies_have_most_bytes(monkeypatch):
    ready(monkeypatch)
    with guarded() as port:
        assert raw(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 40_000).startswith(b"HTTP/1.1 400")
        stated = raw(port, HEAD + b"Content-Length: 100000000\r\n\r\n")  # refused before a byte of it came
        assert stated.startswith(b"HTTP/1.1 413")
        pasted = ask(port, "/v1/chat/completions", "POST", b" " * 10_000_000, Content_Type="application/json")
        assert pasted[0] == 413 and b"larger than 1,048,576 bytes" in pasted[2]
        chunk = b"20000\r\n" + b" " * 0x20000 + b"\r\n"
        unstated = raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 140)
        assert unstated.startswith(b"HTTP/1.1 413") or unstated == b""  # reset while it was still sending
        status, _, content = ask(port, "/v1/chat/completions", "POST", b"{}", Content_Type="text/plain")
        assert status == 415 and b"application/json" in content
        assert raw(port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_quiet_stream_is_kept_alive_until_its_client_no_longer_reads(monkeypatch):
    monkeypatch.setattr(app, "PING_SECONDS", 0.01)
    monkeypatch.setattr(app, "SEND_SECONDS", 0.2)
    sent, cancelled = [], []

    class Quiet:
        def submit(self, requests):
            return ["ticket" for _ in requests]

        cancel = staticmethod(cancelled.append)

    async def send(message):
        sent.append(message.get("body"))
        if len(sent) == 40:
            await asyncio.sleep(60)

    async def listen():
        exchange = app.Exchange(Quiet(), [None])
        events = app._events(exchange, Answers("m", "", [], 1, 1, is_chat=True), include_usage=False)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(app._EventStream(exchange, events)(scope, lambda: asyncio.sleep(60), send), 30)

    asyncio.run(listen())
    assert sent == [None, *[b": ping\n\n"] * 39] and cancelled == ["ticket"]


def test_metrics_do_not_grow_with_paths_that_lead_nowhere():
    metrics = Metrics()
    with guarded() as port:
        for number in range(5):
            ask(port, f"/scan/{number}")
            ask(port, f"/scan/{number}", Host="evil.example")
        text = ask(port, "/metrics")[2].decode()
    assert 'path="other",status="404"} 5' in text and 'path="other",status="421"} 5' in text and "/scan" not in text
    assert metrics.text(0, 0).count("# TYPE") == 10


def test_what_cannot_be_served_is_said_and_exits_2(chat_model, tmp_path):
    short = tmp_path / "token"
    short.write_text("short")
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        cases = [
            ([chat_model, "--host", "0.0.0.0"], "--token-file"),
            ([chat_model, "--token-file", short], "at least 16"),
            ([chat_model, "--token-file", tmp_path / "none"], "no such file"),
            ([chat_model, "--port", port], "cannot listen on 127.0.0.1"),
            ([tmp_path / "none"], "no such file or directory"),
            ([chat_model, "--run", tmp_path], "no metrics.jsonl"),
            ([chat_model, "--port", "0", "--context", "99999"], "was made for at most 4096"),
        ]
        for words, said in cases:
            done = run_cli("serve", *words)
            assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
