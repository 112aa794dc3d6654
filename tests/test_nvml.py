"""Power of a GPU from the driver's energy counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastmoco import nvml


class NVMLError(Exception):
    pass


def driver(energy_mj: list[float]) -> SimpleNamespace:
    """A driver with one GPU, whose counter has these values one after the other, and then fails."""

    def energy(handle: str) -> float:
        if not energy_mj:
            raise NVMLError
        return energy_mj.pop(0)

    def handle(uuid: str) -> str:
        if uuid != "GPU-a":
            raise NVMLError
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def test_power_is_the_energy_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr(nvml, "_nvml", driver([1_000_000.0, 1_600_000.0, 1_700_000.0]))
    meter = nvml.PowerMeter("a", lambda: next(times))
    assert [meter.read_w() for _ in range(4)] == [300.0, 200.0, None, None]


def test_a_gpu_without_a_counter_and_a_machine_without_a_driver_have_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_nvml", driver([]))
    assert nvml.PowerMeter("a").read_w() is None
    assert nvml.PowerMeter("b").read_w() is None
    monkeypatch.setattr(nvml, "_nvml", None)
    assert nvml.PowerMeter("a").read_w() is None
