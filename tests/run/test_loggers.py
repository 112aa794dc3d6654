"""Metric services: the same run after a resume, and no failure of theirs ends a run or delays it for long."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.run.loggers import BackgroundLoggers, Values, check_installed
from fastmoco.run.metrics import read_metrics
from tests.commands.test_cli import TINY


class Service:
    """A service in memory that can fail at any call."""

    name = "service"

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[tuple[Any, ...]] = []

    def log(self, step: int, values: Values) -> None:
        self._call("log", step, values)

    def picture(self, name: str, path: Path) -> None:
        self._call("picture", name, path)

    def close(self, state: str) -> None:
        self._call("close", state)

    def _call(self, method: str, *arguments: Any) -> None:
        if method == self.failing:
            raise SystemExit("the server is\ngone")
        self.calls.append((method, *arguments))


def test_everything_arrives_in_order() -> None:
    service = Service()
    loggers = BackgroundLoggers({"service": lambda: service})
    for step in range(100):
        loggers.log(step, {"loss": step / 2, "verdict": "learning"})
    loggers.picture("views", Path("views.png"))
    assert loggers.close("done") == []
    steps = [("log", step, {"loss": step / 2, "verdict": "learning"}) for step in range(100)]
    assert service.calls == [*steps, ("picture", "views", Path("views.png")), ("close", "done")]


@pytest.mark.parametrize("failing", ["open", "log", "picture", "close"])
def test_a_service_that_fails_is_left_out_and_the_others_go_on(failing: str) -> None:
    good, bad = Service(), Service(failing)

    def make() -> Service:
        if failing == "open":
            raise SystemExit("the server is\ngone")
        return bad

    loggers = BackgroundLoggers({"service": make, "other": lambda: good})
    loggers.log(1, {"loss": 1.0})
    loggers.picture("views", Path("views.png"))
    (warning,) = loggers.close("failed")
    assert warning == "--service is left out from here on (the server is gone); metrics.jsonl has everything"
    assert [call[0] for call in good.calls] == ["log", "picture", "close"]


def test_a_service_that_hangs_is_not_waited_for() -> None:
    released = threading.Event()

    def make() -> Service:
        released.wait()
        return Service()

    loggers = BackgroundLoggers({"service": make}, close_s=0.05)
    loggers.log(1, {"loss": 1.0})
    (warning,) = loggers.close("done")
    assert warning == "a metric service has not taken everything in 0 s"
    released.set()


def test_without_services_nothing_runs() -> None:
    threads = threading.active_count()
    loggers = BackgroundLoggers({})
    loggers.log(1, {"loss": 1.0})
    assert threading.active_count() == threads
    assert loggers.close("done") == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"^--{name} needs a package that is not installed: uv sync"):
        check_installed(RunConfig().replace(**{name: True}))
    check_installed(RunConfig())


def train_and_extend(run: Path, flag: str) -> list[dict[str, Any]]:
    """One epoch, and one more after a resume; returns all records of metrics.jsonl."""
    first = ["train", *TINY, "--log-every", "1", flag, "--out", str(run)]
    assert main(first) == ExitCode.DONE
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == ExitCode.DONE
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
def test_mlflow_has_both_parts_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require_backend: Callable[[str], None]
) -> None:
    require_backend("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    records = train_and_extend(tmp_path / "run", "--mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("fastmoco")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["batch_size"] == "8"
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert len(losses) == 4
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {one.step: one.value for one in history} == pytest.approx(losses)
    assert {one.path for one in client.list_artifacts(found.info.run_id)} == {"views.png", "curves.png"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
def test_wandb_offline_has_both_parts_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require_backend: Callable[[str], None]
) -> None:
    require_backend("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    records = train_and_extend(tmp_path / "run", "--wandb")
    name = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 4
    missing, deadline = losses, time.monotonic() + 60
    while missing and time.monotonic() < deadline:  # a process of wandb's writes, also after the end of a run
        files = tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
        content = b"".join(path.read_bytes() for path in files)
        missing = [loss for loss in losses if repr(loss).encode() not in content]
        time.sleep(0.1)
    assert missing == []
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/views*.png"))) >= 1


def test_wandb_without_a_key_is_left_out_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    require_backend: Callable[[str], None],
) -> None:
    require_backend("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--wandb", "--out", "run"]) == ExitCode.DONE
    output = " ".join(capsys.readouterr().out.split())
    assert "--wandb is left out from here on (there is no API key: wandb login, or set WANDB_MODE=offline)" in output
    assert json.loads(Path("run/status.json").read_text())["state"] == "done"
