from __future__ import annotations

import pytest

from mobillama.deploy.energy import Rapl, open_meters


def zone(root, name, microjoules, most=1000, called="package-0"):
    (root / name).mkdir(exist_ok=True)
    (root / name / "name").write_text(f"{called}\n")
    (root / name / "energy_uj").write_text(f"{microjoules}\n")
    (root / name / "max_energy_range_uj").write_text(f"{most - 1}\n")


def test_packages_are_added_up_parts_left_out_and_a_counter_may_begin_anew(tmp_path):
    zone(tmp_path, "intel-rapl:0", 900)
    zone(tmp_path, "intel-rapl:0:0", 500, called="core")
    zone(tmp_path, "intel-rapl:1", 10)
    zone(tmp_path, "intel-rapl:2", 300, called="psys")  # the platform's, which the packages are part of
    meter = Rapl(tmp_path)
    assert meter.joules() == 0
    zone(tmp_path, "intel-rapl:0", 100)
    zone(tmp_path, "intel-rapl:0:0", 700, called="core")
    zone(tmp_path, "intel-rapl:2", 900, called="psys")
    zone(tmp_path, "intel-rapl:1", 30)
    assert meter.joules() == pytest.approx((200 + 20) / 1e6)
    zone(tmp_path, "intel-rapl:1", 40)
    assert meter.joules() == pytest.approx((200 + 30) / 1e6)


def test_where_nothing_counts_there_is_no_meter(tmp_path, monkeypatch):
    monkeypatch.setattr("mobillama.deploy.energy._POWERCAP", tmp_path)
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path,))
    assert open_meters("cpu") == []
