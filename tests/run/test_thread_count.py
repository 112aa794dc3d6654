"""Tuning of the number of threads on simulated machines: finds the fastest at little cost, and adapts to the load."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.errors import ExitCode
from fastmoco.run.directory import read_config
from fastmoco.run.metrics import read_metrics
from fastmoco.run.resolve import resolve
from fastmoco.run.thread_count import MAX_REST_S, SEARCH_SHARE, ThreadCount, candidates
from fastmoco.step.train_step import TrainStep

Rates = dict[int, float]  # steps/s by number of threads

# Measured on two cores with 0, 1 and 2 other busy processes (docs/log.md).
IDLE: Rates = {1: 10.6, 2: 14.2}
ONE_BUSY: Rates = {1: 10.5, 2: 4.3}
STALLED: Rates = {1: 10.5, 2: 0.2}  # as measured on another processor
SIXTEEN: Rates = {1: 1.4, 2: 2.7, 4: 5.0, 8: 9.0, 12: 12.0, 15: 14.0, 16: 15.0}
SIXTEEN_BUSY: Rates = {1: 1.4, 2: 2.7, 4: 5.0, 8: 8.9, 12: 11.0, 15: 1.5, 16: 1.4}  # four of the cores are busy
QUOTA: Rates = {1: 10.0, 2: 19.0, 4: 6.0, 8: 3.0, 12: 2.0, 15: 1.6, 16: 1.5}  # two of sixteen cores, in a container
TOO_SMALL: Rates = {1: 3.0, 2: 6.0, 4: 9.0, 8: 8.0, 12: 7.0, 15: 6.0, 16: 5.0}  # too little work for many threads


class Machine:
    """Simulated steps, whose duration depends on the number of threads."""

    def __init__(self, rates: Rates, noise: float = 0.0, warm_up: float = 0.3) -> None:
        self.rates, self.noise, self.warm_up = rates, noise, warm_up
        self.random, self.warmed_up, self.now_s, self.steps = random.Random(0), set[int](), 0.0, 0
        self.used: list[int] = []
        self.count = ThreadCount(max(rates), self.used.append)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Steps/s over so many seconds, or until a condition holds."""
        first_s, first_step = self.now_s, self.steps
        while self.now_s - first_s < seconds and not until():
            threads = self.count.threads
            step_s = 1 / self.rates[threads] * (1 + self.noise * self.random.uniform(-1, 1))
            if threads not in self.warmed_up:
                self.warmed_up.add(threads)
                step_s += self.warm_up
            self.now_s += step_s
            self.steps += 1
            self.count.step(step_s)
        return (self.steps - first_step) / (self.now_s - first_s)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("rates", [IDLE, SIXTEEN], ids=["2 cores", "16 cores"])
def test_an_idle_machine_loses_at_most_three_percent(rates: Rates, noise: float) -> None:
    machine = Machine(rates, noise)
    machine.run(5)
    assert machine.run(115) >= 0.97 * max(rates.values())
    assert machine.count.threads == max(rates)


@pytest.mark.parametrize(
    ("rates", "best"),
    [(ONE_BUSY, 1), (STALLED, 1), (SIXTEEN_BUSY, 12), (QUOTA, 2), (TOO_SMALL, 4)],
    ids=["one busy process", "stalled", "16 cores", "a container", "little work"],
)
def test_a_machine_that_is_busy_from_the_start(rates: Rates, best: int) -> None:
    machine = Machine(rates, 0.05)
    machine.run(60, until=lambda: machine.count.threads == best)
    assert machine.now_s < 10 / min(rates.values()) + 8
    assert machine.run(120) >= 0.9 * rates[best]


@pytest.mark.parametrize("busy", [ONE_BUSY, STALLED], ids=["one busy process", "stalled"])
def test_a_temporary_load(busy: Rates) -> None:
    machine = Machine(IDLE, 0.05)
    machine.run(37)
    assert machine.count.threads == 2
    machine.rates = busy
    loaded_s = machine.now_s
    machine.run(120, until=lambda: machine.count.threads == 1)
    assert machine.now_s - loaded_s < 12 / busy[2]
    assert machine.run(120) >= 0.9 * busy[1]
    machine.rates = IDLE
    machine.run(1000, until=lambda: machine.count.threads == 2)
    machine.run(2)
    assert machine.run(60) >= 0.97 * IDLE[2]


def test_expensive_searches_stay_within_their_share() -> None:
    """Steps take 5 s with two threads and 0.1 s with one: tried again, but for two steps at most."""
    machine = Machine(STALLED)
    machine.run(60)
    began_s, steps = machine.now_s, machine.steps
    machine.run(3600)
    slow_s = (machine.now_s - began_s) - (machine.steps - steps) / STALLED[1]
    assert 0 < slow_s <= (SEARCH_SHARE + 0.01) * 3600


def test_steps_of_minutes_are_measured_one_by_one() -> None:
    machine = Machine({1: 1 / 120, 2: 1 / 60})
    assert machine.run(4 * 3600) >= 0.97 / 60
    assert machine.used.count(1) >= 1


def test_ties_change_nothing() -> None:
    """If the input is the bottleneck, the number of threads makes no difference."""
    machine = Machine({1: 10.0, 2: 10.0}, 0.02)
    machine.run(600)
    assert machine.count.threads == 2
    assert len(machine.used) < 600 / MAX_REST_S * 4


def test_the_initial_number_is_restored() -> None:
    machine = Machine(ONE_BUSY)
    machine.run(10)
    assert machine.count.threads == 1
    machine.count.close()
    assert machine.used[-1] == 2


def test_the_candidates() -> None:
    assert candidates(1) == [1]
    assert candidates(2) == [1, 2]
    assert candidates(4) == [1, 2, 3, 4]
    assert candidates(16) == [1, 2, 4, 8, 12, 15, 16]
    assert candidates(6) == [1, 3, 4, 5, 6]


def test_one_thread_has_nothing_to_try() -> None:
    machine = Machine({1: 10.0})
    machine.run(60)
    assert machine.used == []


def test_torchs_number_is_set() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        count = ThreadCount(2)
        for _ in range(100):
            count.step(0.1 if torch.get_num_threads() == 1 else 0.3)
        assert torch.get_num_threads() == 1
        count.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_are_unchanged() -> None:
    assert list(ThreadCount(1).steps(iter([3, 1, 2]))) == [3, 1, 2]


# ---- in a run --------------------------------------------------------------------------------------------------------

RUN = ["--limit", "64", "--batch-size", "8", "--bn-splits", "1", "--moco-k", "16", "--width", "0.125", "--epochs", "2"]
RUN += [
    "--crop-size",
    "8",
    "--amp",
    "fp32",
    "--device",
    "cpu",
    "--knn-every",
    "0",
    "--log-every",
    "1",
    "--workers",
    "0",
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of every step, on a machine on which two threads take ten times as long."""
    threads: list[int] = []
    run = TrainStep.run

    def recorded(self: TrainStep[Any], *arguments: Any) -> None:
        threads.append(torch.get_num_threads())
        run(self, *arguments)

    monkeypatch.setattr(TrainStep, "run", recorded)
    monkeypatch.setattr("fastmoco.run.thread_count.WINDOW_S", 0.0)
    monkeypatch.setattr("fastmoco.run.throughput.StepClock.training_s", property(lambda _: _Time.elapsed(threads)))
    return threads


class _Time:
    @staticmethod
    def elapsed(threads: list[int]) -> float:
        return sum(1.0 if count == 2 else 0.1 for count in threads)


def trained(out: Path, *flags: str) -> Path:
    assert main(["train", *RUN, *flags, "--out", str(out)]) == ExitCode.DONE
    return out


def test_a_run_switches_to_the_fastest_number(two_threads: None, used: list[int], tmp_path: Path) -> None:
    out = trained(tmp_path / "run")
    assert used[:3] == [2, 2, 2]
    assert used[-1] == 1
    assert torch.get_num_threads() == 2  # as before
    logged = [record["cpu_threads"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    assert logged == used


@pytest.mark.parametrize(("flags", "threads"), [(["--cpu-threads", "2"], 2), (["--deterministic"], 2)])
def test_a_run_keeps_a_given_number(
    flags: list[str], threads: int, two_threads: None, used: list[int], tmp_path: Path
) -> None:
    out = trained(tmp_path / "run", *flags)
    assert set(used) == {threads}
    assert read_config(out).run.cpu_threads == threads
    assert all("cpu_threads" not in record for record in read_metrics(out / "metrics.jsonl"))


def test_a_given_number_is_restored_after_the_run(two_threads: None, used: list[int], tmp_path: Path) -> None:
    trained(tmp_path / "run", "--cpu-threads", "1")
    assert set(used) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("flags", "evaluations"), [([], 3), (["--cpu-threads", "2"], 0)])
def test_evaluations_of_a_run_tune_it_too(
    flags: list[str],
    evaluations: int,
    two_threads: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of features before and after training, and of pixels; each reads the bank and the test split."""
    tuned = []

    def recorded(batches: Iterator[Any]) -> Iterator[Any]:
        tuned.append(batches)
        return batches

    monkeypatch.setattr("fastmoco.evaluation.online.with_fastest_threads", recorded)
    trained(tmp_path / "run", *flags, "--knn-every", "2", "--knn-k", "5")
    assert len(tuned) == 2 * evaluations
    assert ("CPU, up to 2 threads" in capsys.readouterr().out) == (evaluations > 0)


def test_deterministic_runs_on_a_cpu_fix_the_number(tmp_path: Path) -> None:
    from pipelines.data.dataset import load_dataset

    images, cpu = load_dataset("shapes", data_root=tmp_path, limit=32).train, torch.device("cpu")
    settings = {"batch_size": 8, "moco_k": 16}
    assert resolve(RunConfig().replace(**settings), images, cpu)[0].run.cpu_threads is None
    resolved = resolve(RunConfig().replace(**settings, deterministic=True), images, cpu)[0]
    assert resolved.run.cpu_threads == torch.get_num_threads()


@pytest.mark.parametrize("threads", ["0", "1025", "two"])
def test_an_invalid_number_is_rejected(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cpu-threads", threads]) == ExitCode.CONFIG
    assert main(["eval", "run", "--cpu-threads", threads]) == ExitCode.CONFIG
    assert capsys.readouterr().err.count("\n") == 2
