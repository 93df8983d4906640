"""What a number was measured with: date, machine, versions and commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import mobillama

_RESULTS = (":!benchmarks/results", ":!docs/experiments")  # what a measurement writes changes nothing it measures
_PACKAGES = ("torch", "transformers", "onnxruntime", "numpy", "sentencepiece", "tokenizers", "datatrove")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def environment() -> dict[str, Any]:
    """Return date (UTC), processor, cores, operating system, versions, and the commit of a source checkout."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "mobillama": mobillama.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the checkout's commit, with ``+`` where files other than recorded results differ from it.

    A copy without its history, in a container say, states its commit in MOBILLAMA_COMMIT, which counts before all else.
    """
    root = Path(mobillama.__file__).parents[2]
    stated = os.environ.get("MOBILLAMA_COMMIT")
    if stated or not (root / ".git").exists():  # an installed package may lie within a checkout of something else
        return stated
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603, S607
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", *_RESULTS],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return stated
    return commit + ("+" if changes else "")
