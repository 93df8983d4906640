"""Counters of energy that a machine has: the processor's (RAPL) and the GPU's (NVML). Nothing is estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts joules."""

    name: str

    def joules(self) -> float:
        """Return the joules counted so far."""
        ...


class Rapl:
    """Processor packages, through the kernel's powercap files (on Intel and AMD; readable by root on most systems)."""

    name = "processor"

    def __init__(self, root: Path = _POWERCAP) -> None:
        # The parts of a package are within it, and so is it in the zone of the whole platform (psys), where there is one.
        self._zones = [
            zone
            for zone in sorted(root.glob("intel-rapl:[0-9]*"))
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package")
        ]
        self._last = [self._read(zone, "energy_uj") for zone in self._zones]
        self._spans = [self._read(zone, "max_energy_range_uj") + 1 for zone in self._zones]
        self._total = 0
        if not self._zones:
            raise OSError("no powercap zone of a package")

    @staticmethod
    def _read(zone: Path, name: str) -> int:
        return int((zone / name).read_text())

    def joules(self) -> float:
        """Return the joules counted since it was opened; a counter that began anew is seen if it did so once."""
        for place, zone in enumerate(self._zones):
            now = self._read(zone, "energy_uj")
            self._total += (now - self._last[place]) % self._spans[place]
            self._last[place] = now
        return self._total / 1e6


class Nvml:
    """The first GPU's own counter (package nvidia-ml-py)."""

    name = "GPU"

    def __init__(self) -> None:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        self._handle: Any = pynvml.nvmlDeviceGetHandleByIndex(0)
        self._library: Any = pynvml
        self.joules()

    def joules(self) -> float:
        """Return the joules since the driver was loaded."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


def open_meters(device: str) -> list[Meter]:
    """Return the counters that can be read here."""
    found: list[Meter] = []
    for kind in (Rapl, Nvml) if device != "cpu" else (Rapl,):
        try:
            found.append(kind())
        except Exception:  # noqa: S112 no package, no driver, no counter, no permission: not measurable here
            continue
    return found
