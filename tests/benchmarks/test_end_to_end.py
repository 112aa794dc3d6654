"""End to end: energy of the sampled window, readings of loaders and steps, and a row for every pipeline."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import train
from benchmarks.measure import end_to_end
from benchmarks.measure.end_to_end import PLAIN, Case, Images, measure, open_case, step_only
from benchmarks.measure.engines import Engine
from benchmarks.measure.plain import Task
from benchmarks.measure.power import Sample, Sampler, read_samples
from benchmarks.measure.variants import CONFIGS, synthetic_views
from fastmoco.errors import ConfigError, DivergedError
from pipelines.backends.select import PIPELINES
from pipelines.data.dataset import load_dataset
from pipelines.errors import BackendMissingError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TASK = replace(CONFIGS["cifar"], side=16, batch_size=4, queue=16, bn_splits=2)


def test_energy_is_the_integral_of_power_without_a_counter_in_the_driver() -> None:
    """100 W for a second, then 300 W at the end of the next: 100 J and 200 J."""
    samples = [Sample(10.0, 100.0), Sample(11.0, 100.0), Sample(11.5), Sample(12.0, 300.0)]
    assert read_samples(samples) == {"joules": 300.0, "power_w": 150.0}


def test_the_drivers_energy_counter_takes_precedence_over_the_integral() -> None:
    samples = [Sample(0.0, 100.0, 5_000.0, 80.0, 3e9), Sample(2.0, 100.0, 5_500.0, 100.0, 4e9)]
    expected = {"joules": 500.0, "power_w": 250.0, "gpu_utilisation_percent": 90.0, "nvml_used_bytes": 4e9}
    assert read_samples(samples) == expected


def test_values_that_a_gpu_does_not_report_are_missing_rather_than_zero() -> None:
    assert read_samples([Sample(0.0), Sample(1.0)]) == {}


def test_sampling_runs_during_the_block_and_ends_with_it() -> None:
    begun = time.perf_counter()
    with Sampler(lambda: Sample(time.perf_counter(), 50.0), period_s=0.005) as sampler:
        while len(sampler.samples) < 5:
            assert time.perf_counter() - begun < 10, "nothing was sampled in ten seconds"
            time.sleep(0.005)
    count = len(sampler.samples)
    assert sampler.reading()["power_w"] == pytest.approx(50.0)
    time.sleep(0.03)
    assert len(sampler.samples) == count


def test_an_error_of_the_driver_is_raised_from_the_thread() -> None:
    answers = iter([Sample(0.0)])

    def query() -> Sample:
        return next(answers)  # the second time it raises

    with pytest.raises(StopIteration), Sampler(query, period_s=0.001):
        time.sleep(0.05)


def _engine(seconds: float = 0.0, loss: float = 1.0) -> Engine:
    """A step that only sleeps."""
    views = synthetic_views(TASK, CPU, torch.float32, channels_last=True)
    return Engine(lambda _: time.sleep(seconds), lambda: loss, views, False, {"host_bytes": 7e9}, 0.0)


def test_a_slow_loader_shows_as_waiting_and_as_a_lower_share_of_the_step() -> None:
    """75 ms per batch and 150 ms per step: a third of the time is waiting, and two thirds of the rate remain."""
    engine = _engine(0.15)

    def slow() -> Iterator[Any]:
        for views in itertools.cycle(engine.synthetic):
            time.sleep(0.075)
            yield views

    loaded = measure(Case(slow, engine, TASK.batch_size), 1.0, CPU)
    alone = measure(step_only(engine, TASK), 1.0, CPU)
    assert loaded["data_wait_percent"] == pytest.approx(100 / 3, abs=12)
    assert alone["data_wait_percent"] < 10
    assert loaded["images_per_s"] / alone["images_per_s"] == pytest.approx(2 / 3, abs=0.2)
    assert loaded["images_per_s"] == pytest.approx(TASK.batch_size / loaded["step_ms"] * 1e3)


def test_a_reading_includes_the_memory_of_step_loader_and_iterator() -> None:
    """Of 256 MiB, since tests before this one may return a part of their memory meanwhile."""
    engine = _engine()

    def large() -> Iterator[Any]:
        block = torch.ones(1 << 26)
        yield from itertools.cycle(engine.synthetic)
        del block

    reading = measure(Case(large, engine, TASK.batch_size, memory={"host_bytes": 1e9}), 0.01, CPU)
    assert 8e9 + (128 << 20) < reading["host_bytes"] < 8e9 + (512 << 20)


def test_batches_are_counted_in_whole_rounds_of_the_workers() -> None:
    engine = _engine()
    assert measure(Case(lambda: itertools.cycle(engine.synthetic), engine, 4, round_of=7), 0.01, CPU)["steps"] % 7 == 0


def test_a_diverged_step_is_an_error() -> None:
    with pytest.raises(DivergedError, match="loss is nan"):
        measure(step_only(_engine(loss=math.nan), TASK), 0.01, CPU)


def test_the_plain_loader_delivers_float32_in_nchw(tmp_path: Path) -> None:
    images = Images(load_dataset("shapes", data_root=tmp_path, limit=16).train, tmp_path, 0)
    cases = {name: open_case(name, images, TASK, CPU, torch.bfloat16, 0, None) for name in ("dataloader", PLAIN)}
    plain, ours = (next(cases[name].batches()) for name in (PLAIN, "dataloader"))
    assert (plain.query.dtype, ours.query.dtype) == (torch.float32, torch.bfloat16)
    assert plain.query.is_contiguous()
    assert plain.key.is_contiguous()
    assert ours.query.is_contiguous(memory_format=torch.channels_last)
    assert plain.key_order.tolist() == list(range(4))  # the plain step shuffles the keys itself


def _main(settings: train.Settings, folder: Path) -> tuple[dict[str, Any], str]:
    with open(folder / "table.txt", "w", encoding="utf-8") as file:
        result = train.main(settings, Console(file=file, width=150))
    return result, (folder / "table.txt").read_text(encoding="utf-8")


def test_a_missing_backend_is_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = end_to_end.open_source

    def refuse(name: str, *others: Any) -> Any:
        if name == "dali":
            raise BackendMissingError("DALI is not installed")
        return opened(name, *others)

    monkeypatch.setattr(end_to_end, "open_source", refuse)
    monkeypatch.setattr(train, "our_engine", lambda *_: _engine(0.001))
    settings = train.Settings(data="shapes", limit=32, pipelines="dali,resident,plain", width=0.25, quick=True)
    result, table = _main(replace(settings, device="cpu", workers=0), tmp_path)
    assert list(result["cases"]) == ["resident"]
    assert result["left_out"].keys() == {"dali", PLAIN}
    assert result["cases"]["resident"]["ratio_to_plain"] is None
    assert "DALI is not installed" in table
    assert "torchvision's ResNets have one width" in table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (train.Settings(pipelines="resident,tensorflow"), "--pipelines tensorflow is unknown"),
        (train.Settings(pipelines=" , "), "--pipelines is empty"),
        (train.Settings(data="shapes", limit=100, device="cpu"), "512 is more than the 100"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings: train.Settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _main(settings, tmp_path)


@pytest.mark.parametrize("batch", [96, 3000])
def test_the_queue_is_a_multiple_of_any_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain step requires it; checked in the task of the first engine."""
    seen: list[Task] = []

    def stop(task: Task, *_: Any, **__: Any) -> Callable[[], None]:
        seen.append(task)
        raise ConfigError("far enough")

    monkeypatch.setattr(train, "resolve_task", stop)
    with pytest.raises(ConfigError, match="far enough"):
        train.main(train.Settings(data="shapes", batch_size=batch, device="cpu"), Console(quiet=True))
    assert seen[0].queue % batch == 0
    assert seen[0].queue > 0


@pytest.mark.slow
def test_the_script_measures_or_lists_every_pipeline(tmp_path: Path) -> None:
    """Started as a file, as in its documentation."""
    command = [sys.executable, "benchmarks/train.py", "--quick", "--device", "cpu", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "train-cifar.json").read_text())
    cases, alone = result["cases"], result["step_only"]
    assert cases.keys() | result["left_out"].keys() == {*PIPELINES, PLAIN}
    assert {"resident", "torch", "dataloader", PLAIN} <= cases.keys()
    assert alone.keys() == {"ours", "plain"}
    assert result["step"]["cuda_graph"] == "off"
    assert result["data"]["images"] == 1024
    for name, case in cases.items():
        assert name in done.stdout
        rates, base = (c["images_per_s"]["values"] for c in (case, alone["plain" if name == PLAIN else "ours"]))
        assert len(rates) == 2
        assert case["step_ms"]["values"][0] == pytest.approx(result["task"]["batch_size"] / rates[0] * 1e3)
        assert case["share_of_step_only"]["values"] == pytest.approx([r / b for r, b in zip(rates, base, strict=True)])
        assert 0 < case["share_of_step_only"]["median"] < 2  # readings of 0.2 s on a machine that others share
        assert case["bottleneck"] == ("step" if case["share_of_step_only"]["median"] >= 0.95 else "input")
        assert math.isfinite(case["ratio_to_plain"]["median"])
        assert 0 < case["data_wait_percent"]["median"] < 100
        assert case["cpu_ms_per_image"]["median"] > 0
        assert case["host_bytes"]["median"] > 100e6  # two encoders and the momentum of one, 45 MB each
    assert cases[PLAIN]["ratio_to_plain"]["values"] == [1.0, 1.0]
