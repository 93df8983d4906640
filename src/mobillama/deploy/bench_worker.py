"""One contender of ``mobillama bench infer``: a process that opens a model and does what it is told, a JSON line each.

    python -P bench_worker.py ENGINE PATH THREADS DEVICE

Only the standard library and numpy are imported before the engine's own, so that any interpreter that holds the engine can
run this file. Commands: {"do": "prefill" | "decode", "tokens": n}, {"do": "read"}, {"do": "memory"}. Seconds are answered.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_PROMPT_BEFORE_DECODING = 64
_READ_BYTES = 512 << 20
Step = Callable[[list[int]], int]
"""Takes tokens in and returns the likeliest next one."""


def open_ours(engine: str, path: str, threads: int, device: str) -> tuple[Step, Callable[[], None], dict[str, Any]]:
    """Open one of this project's engines; return its step, what empties its cache, and facts."""
    before = time.perf_counter()
    from mobillama.engine.load import open_engine

    if engine == "torch":
        import mobillama.engine.torch_engine
    else:
        import mobillama.engine.onnx_engine  # noqa: F401
    imported = time.perf_counter()
    opened = open_engine(Path(path), threads, device)

    def step(ids: list[int]) -> int:
        return int(opened.feed(ids).argmax())

    facts = {
        "import_seconds": imported - before,
        "load_seconds": time.perf_counter() - imported,
        "vocabulary": opened.vocab_size,
        "context": opened.context_length,
        "read_per_token": opened.memory.read_per_token,
        "cache_bytes": opened.memory.cache,
    }
    return step, lambda: opened.truncate(0), facts


def open_llama_cpp(path: str, threads: int) -> tuple[Step, Callable[[], None], dict[str, Any]]:
    """Open llama.cpp through the C interface of llama-cpp-python."""
    before = time.perf_counter()
    import llama_cpp as c

    imported = time.perf_counter()
    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}; a shared GGUF is not for it")
    settings = c.llama_context_default_params()
    settings.n_ctx = min(2048, c.llama_model_n_ctx_train(model))
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    context = c.llama_init_from_model(model, settings)
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        tokens = (c.llama_token * len(ids))(*ids)
        batch = c.llama_batch_get_one(tokens, len(ids))
        if c.llama_decode(context, batch):
            raise SystemExit("llama.cpp: decoding failed")
        logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), shape=(vocabulary,))
        return int(logits.argmax())

    facts = {
        "import_seconds": imported - before,
        "load_seconds": time.perf_counter() - imported,
        "vocabulary": vocabulary,
        "context": settings.n_ctx,
        "version": _version("llama_cpp_python"),
        "kept": [silent],  # the callback must live as long as the process
    }
    return step, lambda: c.llama_memory_clear(c.llama_get_memory(context), True), facts


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def memory(device: str) -> dict[str, Any]:
    """Return bytes of this process: most and now resident, its own alone, and of the GPU the most that tensors took."""
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    rollup = Path("/proc/self/smaps_rollup").read_text() if Path("/proc/self/smaps_rollup").exists() else ""

    def kib(text: str, name: str) -> int | None:
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    own = [kib(rollup, name) for name in ("Private_Clean", "Private_Dirty")]
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.max_memory_allocated()
    return {
        "peak_rss": kib(status, "VmHWM"),
        "rss": kib(status, "VmRSS"),
        "uss": None if None in own else sum(part for part in own if part),
        "gpu": gpu,
    }


class _Reader:
    """Reads 512 MiB with several threads: what the memory gives when nothing is computed."""

    def __init__(self, threads: int, device: str) -> None:
        self._device = device
        if device != "cpu":
            import torch

            self._tensor = torch.zeros(_READ_BYTES // 4, device=device)
            return
        self._parts = np.array_split(np.ones(_READ_BYTES // 8, np.uint64), 8 * threads)
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> float:
        """Return bytes a second."""
        if self._device == "cpu":
            started = time.perf_counter()
            list(self._pool.map(np.max, self._parts))
            return _READ_BYTES / (time.perf_counter() - started)
        import torch

        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            self._tensor.amax()
        torch.cuda.synchronize()
        return 20 * _READ_BYTES / (time.perf_counter() - started)


def main() -> None:
    """Open the model, then answer commands until the input ends."""
    engine, path, threads, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    answers = os.fdopen(os.dup(1), "w")  # what a library prints must not come between
    os.dup2(2, 1)

    def answer(fact: Any) -> None:
        answers.write(json.dumps(fact) + "\n")
        answers.flush()

    if engine == "memory":
        read = _Reader(threads, device)
        answer({})
        for _ in sys.stdin:
            answer({"bytes_per_second": read()})
        return
    if engine == "llama.cpp":
        step, forget, facts = open_llama_cpp(path, threads)
    else:
        step, forget, facts = open_ours(engine, path, threads, device)
    ids = np.random.default_rng(0).integers(3, facts["vocabulary"], facts["context"]).tolist()
    started = time.perf_counter()
    step(ids[:_PROMPT_BEFORE_DECODING])
    kept = facts.pop("kept", None)
    answer(facts | {"first_prefill_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "memory":
            answer(memory(device))
            continue
        forget()
        if command["do"] == "prefill":
            started = time.perf_counter()
            step(ids[: command["tokens"]])
            answer({"seconds": time.perf_counter() - started})
        else:
            token, times = step(ids[:_PROMPT_BEFORE_DECODING]), [time.perf_counter()]
            for _ in range(command["tokens"]):
                token = step([token])
                times.append(time.perf_counter())
            answer({"seconds": times[-1] - times[0], "steps": np.diff(times).tolist()})
    del kept


if __name__ == "__main__":
    main()
