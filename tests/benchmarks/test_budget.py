"""A budget: the parts that matter most, at most its seconds over all commands with one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run_all
from benchmarks.measure.budget import SPENT, Budget, in_order, plan
from benchmarks.measure.suites import CPU, GPU, Part
from benchmarks.run_all import Settings, main

CALL_S = 600.0  # the longest command on some GPU machines
WRITES = "import json, pathlib, sys\nout = pathlib.Path(sys.argv[2])\n(out / 'runs.txt').open('a').write('x')\n"


def part(name: str, limit_s: float, priority: int, script: str = "writes.py", **more: Any) -> Part:
    return Part(1, name, script, ("--out", "{out}"), limit_s, priority=priority, **more)


PARTS = [
    part("loaders", 100, 5),
    part("step", 200, 1),
    part("train", 150, 2),
    part("peers", 150, 2),
    part("report", 20, 5, again=True),
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def budget(total_s: float, file: Path | None = None, **more: Any) -> tuple[Budget, Clock]:
    clock = Clock()
    return Budget(file, total_s, clock=clock, **more), clock


@pytest.mark.parametrize(
    ("total_s", "chosen"),
    [
        (10_000, {"step": 200, "train": 150, "peers": 150, "loaders": 100, "report": 20}),
        (620, {"step": 200, "train": 150, "peers": 150, "loaders": 100, "report": 20}),
        (600, {"step": 200, "train": 150, "peers": 150, "loaders": 80, "report": 20}),
        (540, {"step": 200, "train": 150, "peers": 150, "report": 20}),
        (480, {"step": 200, "train": 150, "peers": 110, "report": 20}),
        (300, {"step": 200, "loaders": 80, "report": 20}),
    ],
)
def test_parts_are_chosen_by_priority_and_the_last_one_that_fits_is_shortened(
    total_s: float, chosen: dict[str, float]
) -> None:
    planned = plan(in_order(PARTS), budget(total_s)[0])
    assert planned.limits_s == chosen
    assert planned.total_s <= total_s
    assert planned.left_out.keys() == {entry.name for entry in PARTS} - chosen.keys()


def test_a_part_that_is_left_out_says_how_long_it_may_take_and_what_is_left() -> None:
    planned = plan(in_order(PARTS), budget(400)[0])
    assert planned.left_out["peers"] == "it may take 150 s, and 30 s of the budget are left"


def test_parts_that_were_stopped_come_after_those_that_were_not_tried() -> None:
    assert [entry.name for entry in in_order(PARTS, ["step"])] == ["train", "peers", "loaders", "step", "report"]


def test_what_earlier_commands_have_spent_is_no_longer_there(tmp_path: Path) -> None:
    first, clock = budget(600, tmp_path / SPENT)
    clock.now = 250
    first.note()
    second, clock = budget(600, tmp_path / SPENT)
    clock.now = 100
    assert second.spent_s == 350
    assert plan(in_order(PARTS), second).limits_s == {"step": 200, "report": 20}
    (tmp_path / SPENT).write_text("{")  # the disk was full
    assert budget(600, tmp_path / SPENT)[0].spent_s == 0


def test_a_command_starts_only_what_it_can_finish() -> None:
    planned = plan(in_order(PARTS), budget(1000, call_s=400)[0])
    assert planned.limits_s == {"step": 200, "train": 150, "report": 20}
    assert planned.left_out["peers"] == "it may take 150 s, and 30 s are left of this command's 400: run it again"


@pytest.mark.parametrize("suite", [CPU, GPU])
def test_the_step_training_and_peers_fit_into_half_an_hour(suite: Sequence[Part]) -> None:
    planned = plan(in_order(suite), budget(1800)[0])
    assert planned.total_s <= 1800
    names = {name.partition("-")[0] for name in planned.limits_s}
    assert {"step", "train", "peers", "roofline", "report"} <= names
    if suite is GPU:
        configurations = {f"{part}-{images}" for part in ("train", "peers") for images in ("cifar10", "imagenette")}
        assert configurations <= planned.limits_s.keys()
    assert all(entry.limit_s <= CALL_S for entry in suite)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "writes.py").write_text(WRITES)
    return folder


def run(tmp_path: Path, scripts: Path, parts: Sequence[Part], **more: Any) -> dict[str, str]:
    settings = Settings(suite="gpu", out=tmp_path / "out", data=(str(tmp_path),), **more)
    return {record["part"]: record["state"] for record in main(settings, parts, scripts)}


def test_the_command_runs_what_fits_and_a_later_one_what_is_missing(
    tmp_path: Path, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = run(tmp_path, scripts, PARTS, budget=350)
    assert list(states) == ["step", "train", "peers", "loaders", "report"]
    # Each ends long before its limit, which leaves time for the next.
    assert states == dict.fromkeys(states, "done")
    out = capsys.readouterr().out
    assert (
        "spent 0 of 350 s; these parts take at most 350 s:\n    step, 200 s\n    train, 130 s\n    report, 20 s" in out
    )
    assert "peers: it may take 150 s, and 0 s of the budget are left" in out

    (tmp_path / "out" / SPENT).write_text(json.dumps({"seconds": 200}))
    states = run(tmp_path, scripts, [*PARTS, part("more", 150, 6)], budget=350)
    before = dict.fromkeys(("step", "train", "peers", "loaders"), "done before")
    assert states == before | {"more": "done", "report": "done"}
    assert json.loads((tmp_path / "out" / SPENT).read_text())["seconds"] > 200


def test_a_spent_budget_starts_nothing_but_the_report(
    tmp_path: Path, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SPENT).write_text(json.dumps({"seconds": 1800}))
    states = run(tmp_path, scripts, PARTS, budget=1800)
    assert states == {
        "step": "left out",
        "train": "left out",
        "peers": "left out",
        "loaders": "left out",
        "report": "done",
    }
    assert "0 s of the budget are left" in capsys.readouterr().out
    assert not (tmp_path / "out" / "step").exists()


def test_a_part_is_stopped_at_its_shortened_limit_and_tried_again_after_the_others(
    tmp_path: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float] = {}

    def stop(command: Sequence[str], log: Any, limit_s: float, note: Callable[[], None]) -> None:
        limits[Path(log.name).parent.name] = limit_s

    monkeypatch.setattr(run_all, "run_limited", stop)
    step, others = part("step", 2000, 1), part("train", 100, 2)
    assert run(tmp_path, scripts, [step], budget=1500) == {"step": "timed out"}
    assert 1200 < limits["step"] <= 1500
    record = json.loads((tmp_path / "out" / "step" / "part.json").read_text())
    assert record["limit_s"] == limits["step"]
    assert list(run(tmp_path, scripts, [step, others], budget=5000)) == ["train", "step"]


def test_the_list_shows_what_a_budget_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Settings(suite="gpu", list=True, budget=700, out=tmp_path / "out"))
    out = capsys.readouterr().out
    assert "spent 0 of 700 s" in out
    assert "train-imagenette: it may take 270 s, and 120 s of the budget are left" in out
    assert not (tmp_path / "out").exists()
