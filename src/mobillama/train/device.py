"""Where and in which precision a model computes."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable

import torch

from mobillama.errors import UsageError

# Share of its speed that mobillama-0.5b lost, and on which GPU, by fused layers or not. Fused: "ours, deterministic" beside
# "ours" in benchmarks/results/train.json. Compiled: the run of docs/experiments/h100-resume made 61.1 thousand tokens/s, a bare
# step that need not be repeatable 66.0 thousand (the same file at commit 897de64).
DETERMINISTIC_COST = {True: (0.05, "H200"), False: (0.08, "H100")}


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: it is no device that training supports, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"device: unknown device '{name}'; use cpu, cuda, cuda:N or auto")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: '{name}' is asked for, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """Return the precision that was asked for; ``auto`` is bfloat16 where this hardware multiplies it fast, else float32."""
    if asked == "auto":
        return "bfloat16" if _has_fast_bfloat16(device) else "float32"
    return asked


def autocast_to(precision: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Return a factory of autocast contexts that compute in ``precision``."""
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed memory for the next step instead of giving it back to the system.

    Activations of a CPU step are megabytes each, and mapping and clearing their pages anew in every step takes a good
    part of its time. Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def make_deterministic() -> None:
    """Let every operation compute the same bits again; an operation that cannot raises an error.

    cuBLAS reads its workspace's size when it is first used, so this comes before any product on the GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy a few numbers off their device; what is returned waits for them, but for no work given out since."""
    if values.device.type != "cuda":
        return values.tolist
    here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def read() -> list[float]:
        copied.synchronize()
        return here.tolist()

    return read


def has_float8(device: torch.device) -> bool:
    """Tell whether a device multiplies float8 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def describe_device(device: torch.device) -> str:
    """Return the device's name for records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""
