"""What a step took, on a device whose name alone is an H100's."""

from __future__ import annotations

import time

import pytest
import torch

from mobillama.recipe import ModelConfig
from mobillama.train.meters import Meters, peak_flops
from mobillama.train.world import World


@pytest.fixture
def meters(monkeypatch) -> Meters:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return Meters(World(0, 2, 2, torch.device("cuda:0")), ModelConfig(), 2048)


def test_mfu_is_stated_with_its_formula_and_peak(meters):
    """1,196 M multiply-adds with weights and 22 layers of 2 × 2,048 × 1,024 with visible keys and values (FACTS: 7.73)."""
    per_token = 6 * (22 * (4 * 2048**2 + 3 * 2048 * 5632) + 32000 * 2048) + 6 * 22 * 2 * 2048 * 1024
    assert meters.describe() == (
        f"MFU = tokens/s × {per_token / 1e9:.3f} GFLOP (6 for each multiply-add with a weight, attention over the visible "
        "half) / (2 × 989 TFLOP/s in bfloat16)"
    )
    facts = meters.read(2 * 16 * 2048, 0.5, meters.look())
    assert facts["mfu"] == pytest.approx(facts["tokens_per_second"] * per_token / (2 * 989e12))
    assert facts["tokens_per_second"] == pytest.approx(2 * 16 * 2048 / facts["seconds"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's energy is measured")
def test_energy_without_a_counter_is_board_power_and_is_called_an_estimate(meters):
    facts = meters.read(1, 0.0, meters.look())
    assert facts["joules"] == {"estimated": pytest.approx(2 * 700 * facts["seconds"])}


def test_what_is_not_known_is_not_stated():
    cpu = Meters(World(0, 1, 1, torch.device("cpu")), ModelConfig(), 2048)
    assert cpu.describe() == ""
    assert not {"mfu", "joules"} & cpu.read(1, 0.0, cpu.look()).keys()
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("Abacus") is None


class Counter:
    """A counter that stands at 100 W before second 10 and between 100 and 200, else at 300 W."""

    def __init__(self, device: torch.device) -> None:
        pass

    def joules(self) -> float:
        seconds = range(int(time.perf_counter()))
        return sum(100.0 if second < 10 or 100 <= second < 200 else 300.0 for second in seconds)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which tests set."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


@pytest.fixture
def counting(meters, clock, monkeypatch) -> Meters:
    monkeypatch.setattr("mobillama.train.meters._EnergyCounter", Counter)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1 << 30)
    return Meters(World(0, 2, 2, torch.device("cuda:0")), ModelConfig(), 2048)


def watts_of_a_step(meters: Meters, clock: list[float]) -> float:
    clock[0] += 1
    look = meters.look()
    clock[0] += 4
    facts = meters.read(1, 0.0, look)
    assert (facts["seconds"], facts["memory_gib"]) == (5.0, 1.0)
    return facts["joules"]["measured"] / 2 / 5


def test_energy_is_power_between_looks_and_leaves_out_what_was_no_step(counting, clock):
    clock[0] = 20.0
    counting.look()
    counting.restart()
    assert watts_of_a_step(counting, clock) == 200.0  # of 20 s, half of them at 100 W
    assert [watts_of_a_step(counting, clock) for _ in range(3)] == [300.0] * 3
    counting.look()
    clock[0] = 200.0  # a validation
    counting.restart()
    assert [watts_of_a_step(counting, clock) for _ in range(3)] == [300.0] * 3


def test_energy_is_known_though_a_validation_follows_every_step(counting, clock):
    clock[0], found = 10.0, []
    counting.look()
    counting.restart()
    for _ in range(4):
        found.append(watts_of_a_step(counting, clock))
        counting.look()
        clock[0] += 10
        counting.restart()
    assert found == [100.0, *[300.0] * 3]
