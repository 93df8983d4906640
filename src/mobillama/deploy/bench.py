"""Tables 6 and 11 of the paper for any models and engines, measured in one run in which the engines take turns.

A machine's speed drifts. So every contender is a process of its own that waits while another one works, and each round
measures all of them, in another order each time. What counts is the ratio of medians; the best tells what noise took.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobillama.data.tokenizer import Tokenizer
from mobillama.deploy.energy import Meter, open_meters
from mobillama.deploy.parity import texts
from mobillama.engine import ENGINES, ONNXRUNTIME, TORCH
from mobillama.engine.gguf import is_gguf, read_gguf
from mobillama.engine.gguf_model import SHARE_KEY
from mobillama.engine.load import check_gpu, check_threads, engine_for, engines_for, tokenizer_of
from mobillama.errors import MobiLlamaError, UsageError
from mobillama.progress import Show
from mobillama.record.environment import available_cores

LLAMA_CPP = "llama.cpp"
PREFILLS = (64, 512)
DECODED = 128
GENERATED = 32  # tokens that the whole verb makes after a prompt that fills the rest of its context
_SETTLING_SECONDS = 0.5
WORKER = Path(__file__).with_name("bench_worker.py")


@dataclass(frozen=True)
class Contender:
    """A model in an engine."""

    path: Path
    engine: str
    python: str
    """Interpreter that holds the engine."""

    @property
    def bytes(self) -> int:
        """Bytes of its weights on disk."""
        if is_gguf(self.path):
            return self.path.stat().st_size
        directory = self.path if self.path.is_dir() else self.path.parent
        return sum(file.stat().st_size for pattern in ("*.safetensors", "*.onnx*") for file in directory.glob(pattern))


def contenders(paths: Sequence[Path], engine: str, llama_python: str | None, device: str = "cpu") -> list[Contender]:
    """Return each model in the engine that opens it best, and in llama.cpp where that is at hand.

    Args:
        paths: model directories and exported files.
        engine: ``auto``, or an engine: only models that it opens are measured then.
        llama_python: an interpreter with llama-cpp-python; None: this one, where it holds it.
        device: cpu, or cuda, where torch alone computes.

    Raises:
        UsageError: a model is missing, none is left for ``engine``, one was made for an engine that knows no GPU, or there is
            no GPU.
    """
    llama_python = llama_python or (sys.executable if _holds_llama_cpp(sys.executable) else None)
    found = []
    for path in paths:
        able = list(engines_for(path))
        if is_gguf(path) and _loads_in_llama_cpp(path) and llama_python:
            able.append(LLAMA_CPP)
        if engine == "auto":
            best = engine_for(path, device=device)
            # torch decodes a GGUF into float32; beside llama.cpp it is measured when asked for.
            able = [
                each
                for each in able
                if each == LLAMA_CPP or (each == best and not (best == TORCH and LLAMA_CPP in able))
            ]
        found += [
            Contender(path, each, llama_python if each == LLAMA_CPP and llama_python else sys.executable)
            for each in able
            if engine in ("auto", each)
        ]
    if not found and engine == LLAMA_CPP and not llama_python:
        raise UsageError("--engine llama.cpp: llama-cpp-python is not installed here; --llama-python names where it is")
    if not found:
        raise UsageError(
            f"--engine: none of the models was made for {engine}; engines are {', '.join(ENGINES)}, {LLAMA_CPP}"
        )
    if device != "cpu" and (other := next((each for each in found if each.engine != TORCH), None)):
        raise UsageError(f"--device {device}: {other.engine} computes on the CPU here; leave {other.path} out")
    check_gpu(device)
    return found


def _holds_llama_cpp(python: str) -> bool:
    words = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('llama_cpp') is None)"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0  # noqa: S603


def _loads_in_llama_cpp(path: Path) -> bool:
    """Tell whether a GGUF file holds every layer's network, as llama.cpp demands."""
    file = read_gguf(path)
    layers = next((int(value) for key, value in file.metadata.items() if key.endswith(".block_count")), 0)
    return file.metadata.get(SHARE_KEY, "none") == "none" or f"blk.{layers - 1}.ffn_gate.weight" in file.tensors


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender, threads: int, device: str, context: int = 0) -> None:
        place = contender.engine if contender.engine == "memory" else f"{contender.path} in {contender.engine}"
        self._place = place
        words = [contender.python, "-P", str(WORKER), contender.engine, str(contender.path), str(threads), device]
        words.append(str(context))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        started = time.perf_counter()
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed with the process
        self._process = subprocess.Popen(  # noqa: S603
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment
        )
        self.facts = self._answer()
        self.seconds_to_first_token = time.perf_counter() - started

    def ask(self, do: str, **more: int) -> dict[str, Any]:
        """Let it do something; return what it says.

        Raises:
            MobiLlamaError: it ended; the message holds its last words.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return dict(json.loads(line))

    def _fail(self) -> None:
        self._process.wait()
        self._said.seek(0)
        words = self._said.read().strip().splitlines() or ["without a word"]
        raise MobiLlamaError(f"{self._place}: the measuring process ended: {words[-1][:300]}")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()


@dataclass(frozen=True)
class Settings:
    """How long and on what is measured."""

    threads: tuple[int, ...]
    rounds: int = 5
    starts: int = 3
    """Processes started for the time to the first token; the last one stays."""
    device: str = "cpu"
    context: int = 0
    """Tokens that engines have room for; 0: what each model was made for."""
    generated_context: int = 1024
    """Tokens of prompt and answer in the process whose peak memory is that of the verb ``generate``."""


def measure(entrants: Sequence[Contender], settings: Settings, show: Show) -> list[dict[str, Any]]:
    """Return a row for each contender and number of threads.

    Raises:
        UsageError: a contender's context has no room for what is measured.
        MobiLlamaError: a contender cannot be opened, or its process ended.
    """
    meters = open_meters(settings.device)
    rows = []
    for threads in settings.threads:
        rows += _measure_at(threads, entrants, settings, meters, show)
    return rows


def _measure_at(
    threads: int,
    entrants: Sequence[Contender],
    settings: Settings,
    meters: list[Meter],
    show: Show,
) -> list[dict[str, Any]]:
    stage = stage_of(threads)
    workers: list[Worker] = []
    probe = Worker(Contender(Path(), "memory", sys.executable), threads, settings.device)
    starts: list[list[float]] = []
    try:
        for contender in entrants:
            starts.append([])
            for number in range(settings.starts):
                worker = Worker(contender, threads, settings.device, settings.context)
                starts[-1].append(worker.seconds_to_first_token)
                if number < settings.starts - 1:
                    worker.close()
            workers.append(worker)
            _require_room(contender, worker.facts["context"])
        time.sleep(_SETTLING_SECONDS)
        for worker in workers:
            worker.facts["rss_prompted"] = worker.ask("memory")["rss"]
        taken: list[dict[str, list[Any]]] = [{} for _ in entrants]
        limits: list[float] = []
        for turn in range(settings.rounds):
            limits.append(probe.ask("read")["bytes_per_second"])
            order = [(turn + place) % len(entrants) for place in range(len(entrants))]
            for done, place in enumerate(order):
                show(f"{stage}: {entrants[place].path.name}", turn * len(order) + done, settings.rounds * len(order))
                _take_turn(workers[place], taken[place], meters)
        show(stage, settings.rounds * len(entrants), settings.rounds * len(entrants))
        return [
            _row(contender, threads, worker, seconds, facts, max(limits), settings, meters)
            for contender, worker, seconds, facts in zip(entrants, workers, starts, taken, strict=True)
        ]
    finally:
        for worker in [*workers, probe]:
            worker.close()


def stage_of(threads: int) -> str:
    """Return a number of threads in words."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _require_room(contender: Contender, context: int) -> None:
    if context < (least := PREFILLS[0] + 2):
        raise UsageError(
            f"{contender.path}: a context of {context} tokens has no room for a prompt of {PREFILLS[0]} and what follows; "
            f"measure with {least} or more"
        )


def _take_turn(worker: Worker, taken: dict[str, list[Any]], meters: list[Meter]) -> None:
    for tokens in PREFILLS:
        if worker.facts["context"] >= tokens:
            seconds = worker.ask("prefill", tokens=tokens)["seconds"]
            taken.setdefault(f"prefill_{tokens}", []).append(tokens / seconds)
    worker.ask("prefill", tokens=PREFILLS[0])
    before = [meter.joules() for meter in meters]
    answer = worker.ask("decode", tokens=min(DECODED, worker.facts["context"] - PREFILLS[0] - 1))
    for meter, joules in zip(meters, before, strict=True):
        taken.setdefault(f"joules {meter.name}", []).append((meter.joules() - joules) / len(answer["steps"]))
    taken.setdefault("decode", []).append(len(answer["steps"]) / answer["seconds"])
    taken.setdefault("step", []).extend(answer["steps"])


def _row(
    contender: Contender,
    threads: int,
    worker: Worker,
    starts: list[float],
    taken: dict[str, list[Any]],
    limit: float,
    settings: Settings,
    meters: list[Meter],
) -> dict[str, Any]:
    facts = worker.facts
    read = facts.get("read_per_token") or _bytes_read_per_token(contender.path)
    decode = statistics.median(taken["decode"])
    return {
        "model": contender.path.name or str(contender.path),
        "engine": contender.engine,
        "threads": threads,
        "device": settings.device,
        "file_bytes": contender.bytes,
        **{
            f"{name}_tokens_per_second": {"median": statistics.median(values), "best": max(values), "all": values}
            for name, values in taken.items()
            if name == "decode" or name.startswith("prefill")
        },
        "first_token_seconds": {"median": statistics.median(starts), "best": min(starts)},
        "import_seconds": facts["import_seconds"],
        "load_seconds": facts["load_seconds"],
        "init_seconds": facts["first_prefill_seconds"],
        "forward_seconds": statistics.median(taken["step"]),
        "memory_bytes": {
            "before_load": facts["rss_before_load"],
            "opened": facts["rss_opened"],
            "prompted": facts["rss_prompted"],
            **worker.ask("memory"),
        },
        "generate": _generate(contender, threads, settings, facts["context"]),
        "read_bytes_per_token": read,
        "bytes_per_second": read * decode,
        "memory_bytes_per_second": limit,
        "joules_per_1000_tokens": {
            meter.name: 1000 * statistics.median(taken[f"joules {meter.name}"]) for meter in meters
        },
        **({"engine_version": facts["version"]} if "version" in facts else {}),
    }


_VERB = """
import pathlib, re, runpy, sys
sys.argv[0] = "mobillama"
try:
    runpy.run_module("mobillama", run_name="__main__")
finally:
    status = pathlib.Path("/proc/self/status")
    print(*re.findall(r"VmHWM:\\s+(\\d+)", status.read_text() if status.exists() else ""), file=sys.stderr)
"""


def _generate(contender: Contender, threads: int, settings: Settings, context: int) -> dict[str, Any] | None:
    """Run the verb ``generate`` over a whole context, in a process of its own; return the most that was resident."""
    if contender.engine == LLAMA_CPP:
        return None
    length = min(settings.generated_context, context)
    prompt = _prompt(tokenizer_of(contender.path), length - min(GENERATED, length // 2))
    words = [
        "generate",
        str(contender.path),
        f"--prompt={prompt}",
        "--temperature",
        "0",
        "--max-tokens",
        str(GENERATED),
    ]
    words += ["--engine", contender.engine, "--threads", str(threads), "--device", settings.device]
    words += [] if contender.engine == ONNXRUNTIME else ["--context", str(length)]
    done = subprocess.run(  # noqa: S603
        [contender.python, "-P", "-c", _VERB, *words], capture_output=True, text=True, check=False
    )
    said = done.stderr.strip().splitlines() or [""]
    if done.returncode:
        raise MobiLlamaError(f"{contender.path} in {contender.engine}: generate ended: {' '.join(said)[-300:]}")
    return {"context": length, "peak_rss": int(said[-1]) * 1024 if said[-1].isdecimal() else None}


def _prompt(tokenizer: Tokenizer, tokens: int) -> str:
    """Return the beginning of real text that has ``tokens`` tokens, or a few less."""
    text, least, most = "", 0, 8 * tokens
    for piece in texts():
        text += piece
        if len(text) >= most:
            break
    while most - least > 1:
        middle = (least + most) // 2
        fits = len(tokenizer.encode([text[:middle]])[0]) <= tokens
        least, most = (middle, most) if fits else (least, middle)
    return text[:least]


def _bytes_read_per_token(path: Path) -> int:
    """Return the bytes of a GGUF file's matrices that a token is multiplied with: all but an embedding table of its own."""
    tensors = read_gguf(path).tensors
    table = tensors["token_embd.weight"].nbytes if "output.weight" in tensors else 0
    return sum(tensor.nbytes for tensor in tensors.values()) - table


def thread_counts(wanted: Sequence[int], device: str = "cpu") -> tuple[int, ...]:
    """Return the numbers of threads to measure at: 1 and all cores (all cores beside a GPU), unless others are wanted.

    Raises:
        UsageError: more threads than cores.
    """
    cores = available_cores()
    check_threads(max(wanted, default=0))
    return tuple(wanted) or ((cores,) if device != "cpu" else tuple(sorted({1, cores})))


def check_python(python: str | None) -> None:
    """Refuse an interpreter without llama-cpp-python.

    Raises:
        UsageError: it is missing or lacks the package.
    """
    if python is not None and (shutil.which(python) is None or not _holds_llama_cpp(python)):
        raise UsageError(
            f"--llama-python: {python} is no interpreter with llama_cpp; make one: python -m venv V && "
            "V/bin/pip install llama-cpp-python"
        )
