"""Where and in which precision a model computes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mobillama.errors import UsageError


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: torch knows no such device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"train.device: unknown device '{name}'; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device: cuda is asked for, but torch sees no CUDA device here; use cpu or auto")
    return device


def choose_autocast(precision: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Return a factory of autocast contexts: bfloat16 when asked for or (``auto``) fast on this hardware, else none."""
    enabled = precision == "bfloat16" or (precision == "auto" and _has_fast_bfloat16(device))
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


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
