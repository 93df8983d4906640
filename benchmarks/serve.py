"""What the server bears and what it costs, written to results/serve.json.

    python benchmarks/serve.py MODEL [--minutes 5] [--clients 64] [--engine torch]

In this order: the bare engine's speed with one sequence and with as many as there are slots; the server's with as many
clients; every prompt answered alone; clients that are killed; then many streaming clients at once for minutes. Each of their
streams must be whole and equal to the same request run alone. Where one differs, the two likeliest tokens must lie within
``--bound`` of each other at the first difference (logarithms of probabilities), since products of several rows add up in
another order; such streams are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
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
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--bound", type=float, default=1e-2, help="of two likeliest tokens where streams may differ")
    parser.add_argument("--remark", default="", help="what readers must know")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    bare = bare_speed(args)
    with served(args) as (address, process):
        facts = asyncio.run(measure(args, address, process))
    overhead = {name: 1 - facts["tokens_per_second"][name] / bare[name] for name in bare}
    result = {
        "slots": args.slots,
        "bare_engine_tokens_per_second": bare,
        **facts,
        "gain_of_slots": facts["tokens_per_second"][str(args.slots)] / facts["tokens_per_second"]["1"],
        "server_overhead": overhead,
        "remark": args.remark,
        "environment": environment(),
    }
    results = read_json(args.out) if args.out.exists() else {}
    write_json(args.out, {**results, f"{args.model.name}, {engine_for(args.model, args.engine)}": result})
    print(json.dumps(result, indent=2))


def bare_speed(args: argparse.Namespace) -> dict[str, float]:
    """Return tokens a second of the engine alone, greedy, with one sequence and with all slots."""
    engine, tokenizer = load_batch_engine(args.model, args.slots, args.engine, args.threads)
    template = ChatTemplate.of(tokenizer)
    assert template, "the model has no chat template"
    found: dict[str, float] = {}
    for count in (1, args.slots):
        speeds = []
        for _ in range(3):
            for slot in range(count):
                engine.truncate(slot, 0)
            talks = [[{"role": "user", "content": LONG[slot % len(LONG)]}] for slot in range(count)]
            prompts = [template.encode(talk, add_generation_prompt=True).ids for talk in talks]
            started = time.perf_counter()
            rows = [engine.feed([(slot, ids)])[0] for slot, ids in enumerate(prompts)]
            for _ in range(args.tokens - 1):
                tokens = [int(row.argmax()) for row in rows]
                rows = list(engine.feed([(slot, [token]) for slot, token in enumerate(tokens)]))
            speeds.append(count * args.tokens / (time.perf_counter() - started))
        found[str(count)] = statistics.median(speeds)
    return found


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
    speeds: dict[str, float] = {}
    firsts: list[float] = []
    for count in (1, args.slots):
        rounds = []
        for number in range(3):
            started = time.perf_counter()
            # Another system message each round, so that no slot holds a prompt already.
            asks = [LONG[place % len(LONG)] for place in range(count)]
            answers = await asyncio.gather(*(stream(client, ask, args.tokens, f"round {number}") for ask in asks))
            rounds.append(sum(tokens for _, tokens, _ in answers) / (time.perf_counter() - started))
            firsts += [first for _, _, first in answers] if count > 1 else []
        speeds[str(count)] = statistics.median(rounds)
    alone = {ask: await reference(client, ask, args.tokens) for ask in PROMPTS}
    freed = await kill_clients(address, args.slots)
    soak = await soak_with(args, client, process.pid, alone)
    return {
        "tokens_per_second": speeds,
        "first_token_seconds": {"clients": args.slots, **quantiles(firsts)},
        "slots_free_after_kill_seconds": freed,
        "soak": soak,
        "prefill_chunk": CHUNK,
    }


async def stream(client: openai.AsyncOpenAI, ask: str, tokens: int, system: str = "") -> tuple[str, int, float]:
    """Return an answer's text, its number of tokens, and the seconds to its first."""
    started, first, parts, said, ended = time.perf_counter(), 0.0, [], 0, False
    messages: Any = [{"role": "system", "content": system}] if system else []
    chunks = await client.chat.completions.create(
        model="model",
        messages=[*messages, {"role": "user", "content": ask}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
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
    messages: Any = [{"role": "user", "content": ask}]
    answer = await client.chat.completions.create(
        model="model", messages=messages, temperature=0, max_tokens=tokens, logprobs=True, top_logprobs=2
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
    body = json.dumps({"model": "model", "prompt": "Once", "max_tokens": 4000, "stream": True, "temperature": 0})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    writers = []
    for _ in range(slots):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write((head + body).encode())
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
