"""One contender of ``mobillama bench infer``: a process that opens a model and does what it is told, a JSON line each.

    python -P bench_worker.py ENGINE PATH THREADS DEVICE CONTEXT

Only the standard library and numpy are imported before the engine's own, so that any interpreter that holds the engine can
run this file. Commands: {"do": "prefill", "tokens": n}, which forgets what was there; {"do": "decode", "tokens": n}, which
goes on after it, so that counters of energy can be read between; {"do": "read"}; {"do": "memory"}. Seconds are answered.
CONTEXT 0 is the model's own.
"""

from __future__ import annotations

import importlib
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

_FIRST_PROMPT = 64
_READ_BYTES = 512 << 20
Step = Callable[[list[int]], int]
"""Takes tokens in and returns the likeliest next one."""


def open_ours(
    engine: str, path: str, threads: int, device: str, context: int
) -> tuple[Step, Callable[[], None], dict[str, Any]]:
    """Open one of this project's engines; return its step, what empties its cache, and facts."""
    before = time.perf_counter()
    from mobillama.engine.load import open_engine

    module = {"torch": "torch_engine", "onnxruntime": "onnx_engine", "native": "native_engine"}[engine]
    importlib.import_module(f"mobillama.engine.{module}")
    imported = time.perf_counter()
    resident = _status("VmRSS")
    # A graph has the context that it was exported for.
    opened = open_engine(Path(path), engine, threads, device, 0 if engine == "onnxruntime" else context)

    def step(ids: list[int]) -> int:
        return int(opened.feed(ids).argmax())

    facts = {
        "import_seconds": imported - before,
        "load_seconds": time.perf_counter() - imported,
        "rss_before_load": resident,
        "vocabulary": opened.vocab_size,
        "context": opened.context_length,
        "read_per_token": opened.memory.read_per_token,
        "cache_bytes": opened.memory.cache,
    }
    return step, lambda: opened.truncate(0), facts


def open_llama_cpp(path: str, threads: int, context_length: int) -> tuple[Step, Callable[[], None], dict[str, Any]]:
    """Open llama.cpp through the C interface of llama-cpp-python."""
    before = time.perf_counter()
    import llama_cpp as c

    imported = time.perf_counter()
    resident = _status("VmRSS")
    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}; a shared GGUF is not for it")
    settings = c.llama_context_default_params()
    settings.n_ctx = min(context_length or 2048, c.llama_model_n_ctx_train(model))
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
        "rss_before_load": resident,
        "vocabulary": vocabulary,
        "context": settings.n_ctx,
        "version": _version("llama_cpp_python"),
        "kept": [silent],  # the callback must live as long as the process
    }
    return step, lambda: c.llama_memory_clear(c.llama_get_memory(context), True), facts


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _status(name: str, file: str = "status") -> int | None:
    """Return bytes that the kernel states of this process."""
    path = Path("/proc/self") / file
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text() if path.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def memory(device: str) -> dict[str, Any]:
    """Return bytes of this process: most and now resident, its own alone, and of the GPU the most that tensors took."""
    own = [_status(name, "smaps_rollup") for name in ("Private_Clean", "Private_Dirty")]
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.max_memory_allocated()
    resident = _status("VmRSS")  # first: reading it takes memory too
    return {
        "peak_rss": _status("VmHWM"),
        "rss": resident,
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
    engine, path, device = sys.argv[1], sys.argv[2], sys.argv[4]
    threads, context = int(sys.argv[3]), int(sys.argv[5])
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
        step, forget, facts = open_llama_cpp(path, threads, context)
    else:
        step, forget, facts = open_ours(engine, path, threads, device, context)
    facts["rss_opened"] = _status("VmRSS")
    ids = np.random.default_rng(0).integers(3, facts["vocabulary"], facts["context"]).tolist()
    started = time.perf_counter()
    token = step(ids[:_FIRST_PROMPT])
    kept = facts.pop("kept", None)
    answer(facts | {"first_prefill_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "memory":
            answer(memory(device))
            continue
        times = [time.perf_counter()]
        if command["do"] == "prefill":
            forget()
            token = step(ids[: command["tokens"]])
            times.append(time.perf_counter())
        else:
            for _ in range(command["tokens"]):
                token = step([token])
                times.append(time.perf_counter())
        answer({"seconds": times[-1] - times[0], "steps": np.diff(times).tolist()})
    del kept


if __name__ == "__main__":
    main()
