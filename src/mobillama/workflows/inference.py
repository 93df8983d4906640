"""``mobillama bench infer``: measure, print beside the paper's Tables 6 and 11, record, draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobillama.console import note, progress, table
from mobillama.deploy.bench import (
    DECODED,
    PREFILLS,
    Settings,
    check_python,
    contenders,
    measure,
    stage_of,
    thread_counts,
)
from mobillama.record.environment import environment
from mobillama.record.files import write_json

# Table 6: tokens/s, MB, mAh for 1,000 tokens, CPU %; 4-bit GGUF but on the GPU, whose row says bf16.
PAPER_TABLE_6 = {
    "RTX 2080Ti": {
        "Llama2-7B": (14.85, 27793, 135.51, 31.62),
        "Phi2-2.7B": (32.19, 12071, 59.13, 24.73),
        "large-base 1.2B": (50.61, 6254, 18.91, 18.25),
        "MobiLlama 0.5B": (63.38, 3046, 8.19, 14.79),
    },
    "laptop i7": {
        "Llama2-7B": (5.96, 4188, 73.5, 49.16),
        "Phi2-2.7B": (22.14, 1972, 27.36, 34.92),
        "large-base 1.2B": (29.23, 1163, 10.81, 30.84),
        "MobiLlama 0.5B": (36.32, 799, 4.86, 24.64),
    },
    "Snapdragon-685": {
        "Llama2-7B": (1.193, 4287, 10.07, 77.41),
        "Phi2-2.7B": (2.882, 1893, 14.61, 56.82),
        "large-base 1.2B": (6.687, 780, 6.00, 17.15),
        "MobiLlama 0.5B": (7.021, 770, 5.32, 13.02),
    },
}
# Table 11, on the GPU: milliseconds to load, to initialise, for a forward pass.
PAPER_TABLE_11 = {"large-base 1.2B": (52, 1896, 15.7), "MobiLlama 0.5B": (27, 642, 9.3)}
_NOT_MEASURED = "–"


def bench_inference(
    paths: Sequence[Path],
    engine: str,
    threads: Sequence[int],
    rounds: int,
    device: str,
    context: int,
    llama_python: str | None,
    remark: str,
    out: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Measure models in engines that take turns, and say what was found.

    Args:
        paths: model directories and exported files.
        engine: auto, or the one engine to measure.
        threads: to measure at; none: 1 and all.
        rounds: turns of each contender.
        device: cpu or cuda.
        context: tokens that engines have room for; 0: what each model was made for.
        llama_python: an interpreter with llama-cpp-python.
        remark: what a reader must know, for example that weights are random.
        out: the JSON file to write.
        picture: the PNG to draw.
        as_json: print JSON instead of tables.

    Raises:
        UsageError: a model, an engine or a number of threads is not to be had.
        MobiLlamaError: a measuring process ended.
    """
    check_python(llama_python)
    entrants = contenders(paths, engine, llama_python, device)
    settings = Settings(thread_counts(threads, device), rounds, device=device, context=context)
    with progress() as show:
        rows = measure(entrants, settings, show)
    result = {"environment": environment(), "remark": remark, "rounds": rounds, "rows": rows}
    if out is not None:
        write_json(out, result)
    if picture is not None:
        from mobillama.report.picture import draw_inference

        draw_inference(result, picture)
    if as_json:
        print(json.dumps(result))
        return
    show_inference(result)


def show_inference(result: dict[str, Any]) -> None:
    """Print what was measured, and the paper's tables."""
    rows = result["rows"]
    where = result["environment"]["machine"] + (f"; {result['remark']}" if result["remark"] else "")
    speed = f"tokens/s, median / best of {result['rounds']} turns ({where})"
    table(
        f"Speed: {speed}",
        [
            "model",
            "engine",
            "threads",
            *(f"prefill {n}" for n in PREFILLS),
            f"decode {DECODED}",
            "GB/s read",
            "of limit",
        ],
        [
            [
                row["model"],
                row["engine"],
                str(row["threads"]),
                *(_pair(row.get(f"prefill_{n}_tokens_per_second")) for n in PREFILLS),
                _pair(row["decode_tokens_per_second"]),
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['bytes_per_second'] / row['memory_bytes_per_second']:.0%}",
            ]
            for row in rows
        ],
    )
    limits = {row["threads"]: row["memory_bytes_per_second"] / 1e9 for row in rows}
    said = ", ".join(f"{limit:.1f} GB/s at {stage_of(threads)}" for threads, limit in limits.items())
    note(
        f"GB/s read: distinct weights of a token × tokens/s. Limit: the best that plain reading of memory reached "
        f"between the turns ({said}); a network that stays in the processor's cache may exceed it."
    )
    names = ["model", "engine", "threads"]
    columns = ["file MB", "load adds MiB", "and a prompt MiB", "peak RSS MiB", "generate MiB", "USS MiB", "GPU MiB"]
    table("Size and memory", [*names, *columns], [_memory_row(row) for row in rows])
    contexts = sorted({row["generate"]["context"] for row in rows if row["generate"]})
    note(
        "load adds: resident memory once the model is open, less that of the process with its libraries; of a file that is "
        "mapped, little is there yet. and a prompt: once a prompt of 64 is taken in. peak RSS: of the measuring process. "
        "generate: the peak of 'mobillama generate' as a process of its own, "
        f"over {', '.join(f'{its:,}' for its in contexts)} tokens of prompt and answer."
    )
    columns = ["first token s", "load ms", "init ms", "forward ms", "J / 1,000 tokens"]
    table("Latency and energy", [*names, *columns], [_latency_row(row) for row in rows])
    note(
        "first token: from the start of a process to the first token after a prompt of 64, file in the page cache. load: "
        "opening the model. init: the first pass over that prompt. forward: the median decoded token."
    )
    if not any(row["joules_per_1000_tokens"] for row in rows):
        note("energy: not measurable here (no readable RAPL counter of the processor, no NVML counter of a GPU)")
    _show_paper()


def _memory_row(row: dict[str, Any]) -> list[str]:
    memory, generated = row["memory_bytes"], row["generate"]
    return [
        row["model"],
        row["engine"],
        str(row["threads"]),
        f"{row['file_bytes'] / 1e6:.1f}",
        *(_mebibytes(memory[name] and memory[name] - memory["before_load"]) for name in ("opened", "prompted")),
        _mebibytes(memory["peak_rss"]),
        _mebibytes(generated and generated["peak_rss"]),
        *(_mebibytes(memory[name]) for name in ("uss", "gpu")),
    ]


def _latency_row(row: dict[str, Any]) -> list[str]:
    energy = row["joules_per_1000_tokens"]
    spent = ", ".join(f"{name} {value:.0f}" for name, value in energy.items()) or _NOT_MEASURED
    return [
        row["model"],
        row["engine"],
        str(row["threads"]),
        f"{row['first_token_seconds']['median']:.2f}",
        *(f"{1000 * row[f'{name}_seconds']:.1f}" for name in ("load", "init", "forward")),
        spent,
    ]


def _pair(values: dict[str, Any] | None) -> str:
    return _NOT_MEASURED if values is None else f"{values['median']:.1f} / {values['best']:.1f}"


def _mebibytes(size: int | None) -> str:
    return _NOT_MEASURED if size is None else f"{size / 2**20:.0f}"


def _show_paper() -> None:
    rows = [
        [f"{model}, {place}", f"{speed:g}", f"{size:,}", f"{charge:g}", f"{share:g}"]
        for place, models in PAPER_TABLE_6.items()
        for model, (speed, size, charge, share) in models.items()
    ]
    table("The paper's Table 6", ["model, platform", "tokens/s", "MB", "mAh / 1,000 tokens", "CPU %"], rows)
    rows = [[model, *(f"{value:g}" for value in values)] for model, values in PAPER_TABLE_11.items()]
    table("The paper's Table 11 (RTX 2080Ti)", ["model", "load ms", "init ms", "forward ms"], rows)
