"""Scaling: one parameter changes along an axis, ratios are to the first point, and omissions are reported."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import scaling
from benchmarks.measure.plain import Task
from benchmarks.measure.variants import Variant
from fastmoco.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"batch": "batch_size", "queue": "queue", "size": "side"}


class _Runner:
    """A step of 1 ms per image, and 10 ms for the plain one, which runs out of memory above a batch of 64."""

    tasks: list[Task] = []  # noqa: RUF012 - of all that were built

    def __init__(self, variant: Variant, task: Task, *_: Any) -> None:
        if variant.name == "plain" and task.batch_size > 64:
            raise torch.OutOfMemoryError("no memory")
        self.tasks.append(task)
        self._ms, self._batch = task.batch_size * (10.0 if variant.name == "plain" else 1.0), task.batch_size
        self.memory = {"peak_resident_bytes": 1e6 * task.queue}

    def __call__(self) -> dict[str, float]:
        self._ms *= 1.5  # a machine that slows down
        return {"ms": self._ms, "images_per_s": self._batch / self._ms * 1e3}


@pytest.fixture
def built_tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    monkeypatch.setattr(scaling, "Runner", _Runner)
    monkeypatch.setattr(_Runner, "tasks", [])
    return _Runner.tasks


def _main(settings: scaling.Settings, folder: Path) -> tuple[dict[str, Any], str]:
    with open(folder / "table.txt", "w", encoding="utf-8") as file:
        result = scaling.main(replace(settings, device="cpu", out=folder), Console(file=file, width=150))
    return result, (folder / "table.txt").read_text(encoding="utf-8")


def test_ratios_are_to_the_first_point_of_the_same_case_in_the_same_round(
    tmp_path: Path, built_tasks: list[Task]
) -> None:
    _, table = _main(scaling.Settings(axis="batch"), tmp_path)
    axis = json.loads((tmp_path / "scaling-cifar.json").read_text())["axes"]["batch"]
    rows = {(row["case"], row["point"]): row for row in axis["rows"]}
    assert list(rows) == [*(("ours", n) for n in (16, 32, 64, 128)), *(("plain", n) for n in (16, 32, 64))]
    assert axis["left_out"].keys() == {"plain at 128"}
    for (_, batch), row in rows.items():
        assert row["ratio_to_first"]["values"] == pytest.approx([batch / 16] * 3)
        assert row["images_per_s"]["values"] == pytest.approx([1e3 * batch / ms for ms in row["step_ms"]["values"]])
    assert "8.00×" in table
    assert "plain at 128 (too little memory" in table


@pytest.mark.parametrize("axis", FIELDS)
def test_one_parameter_changes_along_an_axis(axis: str, tmp_path: Path, built_tasks: list[Task]) -> None:
    result, _ = _main(scaling.Settings(axis=axis, batch_size=32), tmp_path)
    start = Task(**result["task"])
    assert {replace(task, **{FIELDS[axis]: getattr(start, FIELDS[axis])}) for task in built_tasks} == {start}
    points = [getattr(task, FIELDS[axis]) for task in built_tasks]
    assert points == [row["point"] for row in result["axes"][axis]["rows"]]
    assert len(set(points)) == 4
    for task in built_tasks:  # required by the plain step and split batch norm
        assert task.queue % task.batch_size == 0
        assert task.batch_size % task.bn_splits == 0
        assert task.batch_size // task.bn_splits >= 2


@pytest.mark.parametrize("config", ["cifar", "r50"])
def test_the_recipes_own_batches_can_be_halved_and_doubled(
    config: Any, tmp_path: Path, built_tasks: list[Task]
) -> None:
    batch = {"cifar": 512, "r50": 256}[config]
    result, _ = _main(scaling.Settings(config=config, axis="batch,queue", batch_size=batch), tmp_path)
    assert [row["point"] for row in result["axes"]["batch"]["rows"]][:4] == [batch // 4, batch // 2, batch, 2 * batch]
    assert result["task"]["bn_splits"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (scaling.Settings(axis="batch,depth"), "--axis depth is unknown"),
        (scaling.Settings(batch_size=48), "--batch-size 48 cannot be halved and doubled"),
        (scaling.Settings(axis="workers", pipelines="torch,resident"), "--pipelines resident has no workers"),
        (scaling.Settings(axis="workers", data="shapes", limit=30), "64 is more than the 30"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings: scaling.Settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _main(settings, tmp_path)


@pytest.mark.slow
def test_the_script_measures_steps_and_loaders(tmp_path: Path) -> None:
    """Started as a file, as in its documentation."""
    flags = ["--quick", "--device", "cpu", "--axis", "queue,workers", "--pipelines", "torch,dataloader"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", *flags, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    axes = json.loads((tmp_path / "scaling-cifar.json").read_text())["axes"]
    assert list(axes) == ["queue", "workers"]
    expected = {
        "queue": [("ours", 32), ("ours", 64), ("plain", 32), ("plain", 64)],
        "workers": [("torch", 1), ("torch", 2), ("dataloader", 1), ("dataloader", 2)],
    }
    for name, axis in axes.items():
        assert [(row["case"], row["point"]) for row in axis["rows"]] == expected[name]
        assert axis["label"] in done.stdout
        assert axis["left_out"] == {}
        for row in axis["rows"]:
            assert len(row["step_ms"]["values"]) == 2
            assert row["images_per_s"]["values"][0] == pytest.approx(8 / row["step_ms"]["values"][0] * 1e3)
            assert 0 < row["ratio_to_first"]["median"] < math.inf
            memory = row["peak_resident_bytes" if name == "queue" else "host_bytes"]["median"]
            assert memory > 0
        first = axis["rows"][0]
        assert first["ratio_to_first"]["values"] == [1.0, 1.0]
