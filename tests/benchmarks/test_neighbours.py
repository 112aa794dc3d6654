"""Training beside busy processes: ratios, failures, and that no process is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from benchmarks import neighbours
from benchmarks.measure.training_process import FIXED, PASSIVE, TUNED, TrainingProcess, TrainingSettings
from benchmarks.neighbours import Settings
from fastmoco.errors import ConfigError, RankLostError

ROOT = Path(__file__).resolve().parents[2]
RATES = {TUNED: (400.0, 300.0, 200.0), FIXED: (410.0, 100.0, 50.0), PASSIVE: (250.0, 120.0, 80.0)}


class _TrainingProcess:
    """A process that trains at RATES, on a machine that slows down by a tenth in every round."""

    beside = 0
    round = 0

    def __init__(self, pipeline: str, kind: str, data: str, settings: TrainingSettings, seconds: float) -> None:
        self.pipeline, self.kind = pipeline, kind

    def read(self) -> dict[str, float]:
        rate = RATES[self.kind][self.beside] * 0.9**self.round
        return {"images_per_s": rate, "threads": 2.0 - (self.kind == TUNED and self.beside > 0)}

    def __enter__(self) -> _TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Neighbours:
    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        _TrainingProcess.beside = self.count
        _TrainingProcess.round += self.count == 0

    def __exit__(self, *_: object) -> None:
        _TrainingProcess.beside = 0


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "TrainingProcess", _TrainingProcess)
    monkeypatch.setattr(neighbours, "neighbours", _Neighbours)
    monkeypatch.setattr(_TrainingProcess, "round", 0)


def _main(settings: Settings, folder: Path) -> tuple[dict[str, Any], str]:
    with open(folder / "table.txt", "w", encoding="utf-8") as file:
        neighbours.main(replace(settings, out=folder), Console(file=file, width=150))
    return json.loads((folder / "neighbours.json").read_text()), (folder / "table.txt").read_text(encoding="utf-8")


def test_ratios_are_within_a_round(tmp_path: Path, simulated: None) -> None:
    settings = Settings(pipelines="resident,torch", repetitions=3)
    result, table = _main(settings, tmp_path)
    rows = {(row["pipeline"], row["threads"], row["neighbours"]): row for row in result["rows"]}
    assert rows["resident", TUNED, 1]["kept"]["median"] == pytest.approx(300 / 400)
    assert rows["resident", TUNED, 2]["to_fixed"]["median"] == pytest.approx(200 / 50)
    assert rows["resident", FIXED, 1]["kept"]["median"] == pytest.approx(100 / 410)
    assert rows["resident", PASSIVE, 0]["to_idle_fixed"]["median"] == pytest.approx(250 / 410)
    assert rows["torch", TUNED, 1]["used_threads"]["median"] == 1
    assert ("torch", PASSIVE, 0) not in rows  # measured with the first pipeline only
    assert all(len(row["images_per_s"]["values"]) == 3 for row in rows.values())
    assert "75%" in table
    assert "61%" in table


def test_neighbours_are_busy_and_end_with_the_block() -> None:
    before = _spinning()
    with neighbours.neighbours(2):
        deadline = time.monotonic() + 60
        while len(mine := _spinning() - before) < 2 or not all(p.cpu_times().user for p in mine):
            assert time.monotonic() < deadline, "they are idle"
            time.sleep(0.05)
    assert _spinning() <= before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(pipelines="resdent"), "--pipelines resdent is unknown"),
        (Settings(pipelines=""), "--pipelines is empty"),
        (Settings(threads="many"), "--threads many is unknown"),
        (Settings(neighbours="1,x"), "expected numbers from 0 to 64"),
        (Settings(neighbours="65"), "expected numbers from 0 to 64"),
    ],
)
def test_bad_settings_are_one_line(settings: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        neighbours.main(settings)


@pytest.mark.slow
def test_a_training_process_that_dies_is_named() -> None:
    settings = TrainingSettings(batch_size=8, width=0.125, workers=0)
    with ExitStack() as stack:
        training = stack.enter_context(TrainingProcess("resident", FIXED, "shapes", settings, seconds=60.0))
        process = training._process
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RankLostError, match="process of resident fixed has died"):
            training.read()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two threads are very slow on a busy machine, which is what the script measures
def test_the_script_measures_and_leaves_no_process_running(tmp_path: Path) -> None:
    before = _spinning()
    command = [sys.executable, "benchmarks/neighbours.py", "--quick", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "neighbours.json").read_text())
    rows = [(row["pipeline"], row["threads"], row["neighbours"]) for row in result["rows"]]
    assert rows == [("resident", kind, count) for kind in (TUNED, FIXED) for count in (0, 1)]
    assert all(row["images_per_s"]["median"] > 0 for row in result["rows"])
    assert _spinning() <= before


def _spinning() -> set[psutil.Process]:
    """Processes of this machine that run a neighbour's command."""
    processes = psutil.process_iter(["cmdline"])
    return {process for process in processes if (process.info["cmdline"] or [])[1:] == ["-c", neighbours.SPIN]}
