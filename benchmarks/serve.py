"""What the server bears and what it costs, written to results/serve.json.

    python benchmarks/serve.py MODEL [--minutes 5] [--clients 64] [--engine torch]

In this order: the seconds from the start of ``mobillama chat`` to the first text of an answer; the speeds of the bare engine
and of the server, with one sequence and with as many as there are slots; every prompt answered alone; clients that are killed;
then many streaming clients at once for minutes. Each of their streams must be whole and equal to the same request run alone.
Where one differs, the two likeliest tokens must lie within ``--bound`` of each other at the first difference (logarithms of
probabilities), since products of several rows add up in another order; such streams are counted.

Engine and server take turns, round by round, with the same prompts and lengths; medians are compared. The client of these
rounds reads bytes and parses them when all have come, so that next to nothing of the difference is its own. All others are
OpenAI's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pty
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai

from mobillama.data.template import ChatTemplate
from mobillama.engine.load import engine_for, load_batch_engine
from mobillama.record.environment import environment
from mobillama.record.files import read_json, write_json
from mobillama.serve.scheduler import CHUNK

RESULTS = Path(__file__).parent / "results" / "serve.json"
SUBJECTS = ("the sea", "a lighthouse", "bread", "Paris", "the moon", "a small dog", "winter", "bicycles")
ASKS = ("Write three sentences about {}.", "Explain {} to a child.", "List five facts about {}.")
LONG = [f"Write a very long story about {subject}, with many details." for subject in SUBJECTS]
PROMPTS = [ask.format(subject) for ask, subject in itertools.product(ASKS, SUBJECTS)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="of engine and server in turn")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--bound", type=float, default=1e-2, help="of two likeliest tokens where streams may differ")
    parser.add_argument("--remark", default="", help="what readers must know")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    terminal = terminal_seconds(args)
    with served(args) as (address, process):
        speeds = compare_speeds(args, address, process)
        facts = asyncio.run(measure(args, address, process))
    result = {
        "slots": args.slots,
        "answer_tokens": args.tokens,
        "terminal_first_text_seconds": terminal,
        **speeds,
        **facts,
        "remark": args.remark,
        "environment": environment(),
    }
    results = read_json(args.out) if args.out.exists() else {}
    write_json(args.out, {**results, f"{args.model.name}, {engine_for(args.model, args.engine)}": result})
    print(json.dumps(result, indent=2))


def terminal_seconds(args: argparse.Namespace) -> float:
    """Return the median seconds from the start of ``mobillama chat`` in a terminal to the first text of its answer."""
    bare, ask = Bare(args, slots=1), "Why is the sky blue?"
    logits_v = bare.engine.feed([(0, bare.prompt(ask))])[0]
    first = bare.tokenizer.token_bytes[int(logits_v.argmax())]
    command = [sys.executable, "-m", "mobillama", "chat", args.model, "--engine", args.engine, "--temperature", "0"]
    command += ["--threads", args.threads] if args.threads else []
    found = []
    for _ in range(6):
        here, there = pty.openpty()
        started = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdin=there, stdout=there, stderr=there)
        os.close(there)
        os.write(here, f"{ask}\n".encode())
        text = b""
        while first not in text.rpartition(f"{ask}\r\n".encode())[2] or b"Ctrl-D leaves" not in text:
            text += os.read(here, 65536)
        found.append(time.perf_counter() - started)
        process.kill()
        process.wait()
        os.close(here)
    return statistics.median(found[1:])  # the first brought the files into memory


class Bare:
    """The engine alone."""

    def __init__(self, args: argparse.Namespace, slots: int) -> None:
        self.engine, self.tokenizer = load_batch_engine(args.model, slots, args.engine, args.threads)
        template = ChatTemplate.of(self.tokenizer)
        assert template, "the model has no chat template"
        self._template = template

    def prompt(self, ask: str, system: str = "") -> list[int]:
        """Return a question in ids."""
        return self._template.encode(messages_of(ask, system), add_generation_prompt=True).ids

    def speed(self, asks: list[str], system: str, tokens: int) -> float:
        """Return tokens a second of greedy answers to several questions at once."""
        for slot in range(len(asks)):
            self.engine.truncate(slot, 0)
        prompts = [self.prompt(ask, system) for ask in asks]
        started = time.perf_counter()
        rows = self.engine.feed(list(enumerate(prompts)))
        for _ in range(tokens - 1):
            drawn = [int(row.argmax()) for row in rows]
            rows = self.engine.feed([(slot, [token]) for slot, token in enumerate(drawn)])
        return len(asks) * tokens / (time.perf_counter() - started)


def compare_speeds(args: argparse.Namespace, address: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the speeds of engine and server, and what of a core the server's event loop and the client take."""
    bare, firsts = Bare(args, args.slots), []
    alone: dict[str, float] = {}
    through: dict[str, float] = {}
    shares: dict[str, dict[str, float]] = {}
    for count in (1, args.slots):
        asks = [LONG[place % len(LONG)] for place in range(count)]
        pairs, seconds, loop, client = [], 0.0, 0.0, 0.0
        for number in range(args.rounds + 1):
            system = f"This is round {number}."  # so that no slot holds a prompt already
            speed = bare.speed(asks, system, args.tokens)
            before = cpu_seconds(process.pid), time.thread_time(), time.perf_counter()
            answers = answers_to(address, asks, system, args.tokens)
            took = time.perf_counter() - before[2]
            if number:  # the first warms both
                pairs.append((speed, sum(said for said, _ in answers) / took))
                firsts += [first for _, first in answers] if count > 1 else []
                seconds, client = seconds + took, client + time.thread_time() - before[1]
                loop += cpu_seconds(process.pid) - before[0]
        alone[str(count)], through[str(count)] = map(statistics.median, zip(*pairs, strict=True))
        shares[str(count)] = {"event_loop": loop / seconds, "client": client / seconds}
    return {
        "bare_engine_tokens_per_second": alone,
        "tokens_per_second": through,
        "gain_of_slots": through[str(args.slots)] / through["1"],
        "server_overhead": {name: 1 - through[name] / alone[name] for name in alone},
        "share_of_a_core": shares,
        "first_token_seconds": {"clients": args.slots, **quantiles(firsts)},
    }


def answers_to(address: str, asks: list[str], system: str, tokens: int) -> list[tuple[int, float]]:
    """Return of streamed greedy answers, computed together, the number of tokens and the seconds to the first."""
    host, port = address.removeprefix("http://").split(":")
    waiting, parts = selectors.DefaultSelector(), [[] for _ in asks]  # type: list[list[tuple[float, bytes]]]
    started = time.perf_counter()
    for number, ask in enumerate(asks):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(request_to(host, "chat/completions", ask_of(ask, system, tokens)))
        waiting.register(connection, selectors.EVENT_READ, (connection, parts[number]))
    while waiting.get_map():
        for key, _ in waiting.select():
            connection, its_parts = key.data
            if data := connection.recv(1 << 16):
                its_parts.append((time.perf_counter() - started, data))
            else:
                waiting.unregister(connection)
                connection.close()
    return [told_in(its_parts) for its_parts in parts]


def told_in(parts: list[tuple[float, bytes]]) -> tuple[int, float]:
    """Return the number of tokens and the seconds to the first of a stream that ended."""
    whole = b"".join(data for _, data in parts)
    assert b"data: [DONE]" in whole, "a stream ended before its answer"
    usage = json.loads(next(line for line in whole.split(b"\n") if b'"usage":{' in line).removeprefix(b"data: "))
    first = next(seconds for seconds, data in parts if b'"finish_reason":null' in data)
    return usage["usage"]["completion_tokens"], first


def ask_of(ask: str, system: str, tokens: int) -> dict[str, Any]:
    """Return a request for a greedy streamed answer."""
    options = {"temperature": 0, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": "model", "messages": messages_of(ask, system), **options}


def messages_of(ask: str, system: str = "") -> list[dict[str, str]]:
    """Return a question as a conversation."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": ask}]


def request_to(host: str, path: str, body: dict[str, Any]) -> bytes:
    """Return the bytes of a request, after whose answer the server closes."""
    content = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process' first thread, which is the server's event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the server; yield its address and process."""
    words = [
        "--engine",
        args.engine,
        "--slots",
        args.slots,
        "--queue",
        args.clients // 2,
        "--port",
        0,
        "--name",
        "model",
    ]
    words += ["--threads", args.threads] if args.threads else []
    command = [sys.executable, "-u", "-m", "mobillama", "serve", args.model, *words]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        address = process.stdout.readline().split("http://")[1].split()[0]
        assert "is ready" in process.stdout.readline()
        yield f"http://{address}", process
    finally:
        process.terminate()
        process.wait()


async def measure(args: argparse.Namespace, address: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what clients see."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    alone = {ask: await reference(client, ask, args.tokens) for ask in PROMPTS}
    freed = await kill_clients(address, args.slots)
    soak = await soak_with(args, client, process.pid, alone)
    return {
        "slots_free_after_kill_seconds": freed,
        "soak": soak,
        "prefill_chunk": CHUNK,
    }


async def stream(client: openai.AsyncOpenAI, ask: str, tokens: int) -> tuple[str, int, float]:
    """Return an answer's text, its number of tokens, and the seconds to its first."""
    started, first, parts, said, ended = time.perf_counter(), 0.0, [], 0, False
    chunks = await client.chat.completions.create(**ask_of(ask, "", tokens))
    async for chunk in chunks:
        if chunk.usage:
            said = chunk.usage.completion_tokens
        elif text := chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            parts.append(text)
        ended = ended or any(choice.finish_reason is not None for choice in chunk.choices)
    assert ended and said, "a stream ended before its answer"
    return "".join(parts), said, first


async def reference(client: openai.AsyncOpenAI, ask: str, tokens: int) -> tuple[str, list[tuple[int, float]]]:
    """Return a text computed alone, and for each token where its text begins and how far the runner-up is."""
    answer = await client.chat.completions.create(
        model="model", messages=messages_of(ask), temperature=0, max_tokens=tokens, logprobs=True, top_logprobs=2
    )
    known, place, gaps = answer.choices[0].logprobs, 0, []
    assert known and known.content
    for token in known.content:
        gaps.append((place, token.top_logprobs[0].logprob - token.top_logprobs[1].logprob))
        place += len(token.token)
    return answer.choices[0].message.content or "", gaps


async def kill_clients(address: str, slots: int) -> float:
    """Fill all slots, drop the connections, and return the seconds until the slots are free."""
    host, port = address.removeprefix("http://").split(":")
    body = {"model": "model", "prompt": "Once", "max_tokens": 4000, "stream": True, "temperature": 0}
    writers = []
    for _ in range(slots):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request_to(host, "completions", body))
        writers.append(writer)
    while await running(host, port) < slots:
        await asyncio.sleep(0.05)
    for writer in writers:
        writer.transport.abort()
    started = time.perf_counter()
    while await running(host, port):
        await asyncio.sleep(0.01)
    return time.perf_counter() - started


async def running(host: str, port: str) -> int:
    """Return how many requests the server runs."""
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return int(text.split("\nmobillama_requests_running ")[1].split()[0])


async def soak_with(
    args: argparse.Namespace,
    client: openai.AsyncOpenAI,
    pid: int,
    alone: dict[str, tuple[str, list[tuple[int, float]]]],
) -> dict[str, Any]:
    """Run many clients for minutes; return what came of their streams and of the server's memory."""
    counts: Counter[str] = Counter()
    firsts: list[float] = []
    sizes: list[int] = []
    tokens = 0
    end = time.monotonic() + 60 * args.minutes

    async def talk(number: int) -> None:
        nonlocal tokens
        for place in itertools.count(number):
            if time.monotonic() > end:
                return
            ask = PROMPTS[place % len(PROMPTS)]
            try:
                text, said, first = await stream(client, ask, args.tokens)
            except openai.RateLimitError:
                counts["refused with 429"] += 1
                await asyncio.sleep(1)
                continue
            except Exception as error:
                counts[f"error: {type(error).__name__}"] += 1
                continue
            tokens += said
            firsts.append(first)
            counts[judged(text, *alone[ask], args.bound)] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            sizes.append(resident(pid))
            await asyncio.sleep(0.5)

    started = time.monotonic()
    await asyncio.gather(watch(), *(talk(number) for number in range(args.clients)))
    fifth = max(1, len(sizes) // 5)
    early, late = statistics.mean(sizes[fifth : 2 * fifth] or sizes), statistics.mean(sizes[-fifth:])
    return {
        "clients": args.clients,
        "seconds": time.monotonic() - started,
        "streams": dict(counts),
        "tokens_per_second": tokens / (time.monotonic() - started),
        "bound": args.bound,
        "first_token_seconds": quantiles(firsts),
        "resident_mib": {"second_fifth": early, "last_fifth": late, "growth": late / early - 1},
    }


def judged(text: str, expected: str, gaps: list[tuple[int, float]], bound: float) -> str:
    """Return in a word how a stream compares with the same request run alone."""
    if text == expected:
        return "equal"
    same = next((n for n, (one, other) in enumerate(zip(text, expected, strict=False)) if one != other), 0)
    same = same or min(len(text), len(expected))
    gap = [gap for place, gap in gaps if place <= same][-1]
    return "differs where two tokens are as likely" if gap <= bound else "differs"


def resident(pid: int) -> int:
    """Return the MiB of memory that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 95th percentile."""
    return {"median": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95))}


if __name__ == "__main__":
    main()
