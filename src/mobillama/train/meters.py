"""What a step took of the machine: speed, share of its peak, memory, energy."""

from __future__ import annotations

import re
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from mobillama.model.cost import model_cost
from mobillama.recipe import ModelConfig
from mobillama.train.world import World

# Name, pattern of torch's name for it, dense bfloat16 FLOP/s, board power in watts; from the vendor's data sheets.
GPUS = (
    ("H100 PCIe", r"H100 PCIe", 756e12, 350),
    ("H100 NVL", r"H100 NVL", 835e12, 400),
    ("H100", r"H100|GH200", 989e12, 700),
    ("H200", r"H200", 989e12, 700),
    ("B200", r"B200", 2250e12, 1000),
    ("A100", r"A100", 312e12, 400),
    ("L40S", r"L40S", 362e12, 350),
    ("A10G", r"A10G", 70e12, 300),
    ("RTX 4090", r"RTX 4090", 165e12, 450),
    ("RTX 3090", r"RTX 3090", 71e12, 350),
)


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense bfloat16 FLOP/s by its name, or None where it is not known."""
    return next((flops for _, pattern, flops, _ in GPUS if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class Look:
    """What a device shows while it computes a step."""

    memory: int
    """The most bytes that were held so far."""
    watts: float | None
    """Mean power since the look before, or before that if what lay between was no step; None where it is not measured."""


class Meters:
    """Read after each step; what is known of this process's device stands for all.

    MFU is tokens/s × FLOPs per token / (peak × devices), with 6 FLOPs for each multiply-add with a weight and attention's
    counted over the visible half of the context (:func:`mobillama.model.cost.model_cost`).
    """

    def __init__(self, world: World, config: ModelConfig, context: int) -> None:
        self.world, self._cost = world, model_cost(config, context)
        cuda = world.device.type == "cuda"
        name = torch.cuda.get_device_name(world.device) if cuda else ""
        self._peak = peak_flops(name)
        self._board_watts = next((watts for _, pattern, _, watts in GPUS if re.search(pattern, name)), None)
        self._counter = _EnergyCounter(world.device) if cuda else None
        self._last = time.perf_counter()
        self._counted = self._count()
        self._watts: float | None = None

    def describe(self) -> str:
        """Return how MFU is computed, for people; empty where the device's peak is not known."""
        if not self._peak:
            return ""
        per_token = self._cost.training_flops_causal
        return (
            f"MFU = tokens/s × {per_token / 1e9:.3f} GFLOP (6 for each multiply-add with a weight, attention over the "
            f"visible half) / ({self.world.size} × {self._peak / 1e12:.0f} TFLOP/s in bfloat16)"
        )

    def look(self) -> Look:
        """Return what a driver takes milliseconds to tell; asked for while the device has work, it costs nothing."""
        before, self._counted = self._counted, self._count()
        if before and self._counted:
            self._watts = (self._counted[1] - before[1]) / (self._counted[0] - before[0])
        return Look(self._memory(), self._watts)

    def read(self, tokens: int, waited: float, look: Look) -> dict[str, Any]:
        """Return the facts of the step that ended now.

        Args:
            tokens: that it learned from, over all processes.
            waited: seconds in which this process waited for data.
            look: taken while the step was computed.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        facts: dict[str, Any] = {"seconds": seconds, "tokens_per_second": tokens / seconds, "data_wait": waited}
        if self._peak:
            flops = tokens / seconds * self._cost.training_flops_causal
            facts["mfu"] = flops / (self._peak * self.world.size)
        facts["memory_gib"] = look.memory / 2**30
        if look.watts is not None:
            facts["joules"] = {"measured": look.watts * seconds * self.world.size}
        elif self._board_watts:
            facts["joules"] = {"estimated": self._board_watts * seconds * self.world.size}
        return facts

    def restart(self) -> None:
        """Leave out what happened since the last reading (a validation, a checkpoint's copy)."""
        self._last, self._counted = time.perf_counter(), None

    def _count(self) -> tuple[float, float] | None:
        """Return the time, and the joules that the device's counter shows then; None where there is none."""
        joules = self._counter.joules() if self._counter else None
        return None if joules is None else (time.perf_counter(), joules)

    def _memory(self) -> int:
        """Return the most bytes that were held so far: on the GPU by tensors, else by this process."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _EnergyCounter:
    """The GPU's own energy counter, through NVML where the package nvidia-ml-py is installed."""

    def __init__(self, device: torch.device) -> None:
        self._read: Any = None
        try:
            import pynvml  # type: ignore[import-not-found]

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            self._read()
        except Exception:  # no package, no driver, no counter: energy is estimated then
            self._read = None

    def joules(self) -> float | None:
        """Return the joules since the driver was loaded, or None where they cannot be read."""
        return self._read() if self._read else None
