"""Services that metrics also go to: Weights & Biases (--wandb) and MLflow (--mlflow), both optional packages.

They run in a thread of their own and may fail at any time: the run says so in one line and goes on. Their own settings
come from the environment: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ... `loggers.json` in
the folder of the run has their names of the run, so that a resumed run goes on in the same one.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError
from pipelines.errors import how_to_install
from pipelines.files import read_json_object, write_atomically

FILE_NAME = "loggers.json"
PROJECT = "fastmoco"  # unless the environment names another
_MOST_WAITING = 10_000  # entries; a service that is slower loses what comes then
_CLOSE_S = 30.0

Values = Mapping[str, float | str | None]


class Logger(Protocol):
    """A service that shows the metrics of a run. Every method may raise anything."""

    name: str

    def log(self, step: int, values: Values) -> None:
        """Add the metrics of a step: numbers, and texts such as a verdict."""
        ...

    def picture(self, name: str, path: Path) -> None:
        """Add a PNG file."""
        ...

    def close(self, state: str) -> None:
        """End: `done`, `preempted` or `failed`."""
        ...


class WandbLogger:
    """Weights & Biases; with WANDB_MODE=offline, files below ./wandb for `wandb sync`."""

    name = "wandb"

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and wandb.api.api_key is None:
            raise ConfigError("there is no API key: wandb login, or set WANDB_MODE=offline")
        self._library: Any = wandb
        self._run: Any = wandb.init(
            id=run_id,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own steps may not go back, as a resumed run's do

    def log(self, step: int, values: Values) -> None:
        self._run.log({"step": step, **values})

    def picture(self, name: str, path: Path) -> None:
        self._run.log({name: self._library.Image(str(path))})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "done" else 1)


class MlflowLogger:
    """MLflow; without MLFLOW_TRACKING_URI, its files in the current folder."""

    name = "mlflow"

    def __init__(self, folder: Path, run_id: str | None, config: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._metric, self._tag, self._client = Metric, RunTag, MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            run_id = self._client.create_run(number, run_name=folder.name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in config.items()]
            for first in range(0, len(params), 100):  # MLflow's limit of one call
                self._client.log_batch(run_id, params=params[first : first + 100])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id: str = run_id

    def log(self, step: int, values: Values) -> None:
        now = int(time.time() * 1000)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        metrics = [self._metric(name, float(value), now, step) for name, value in numbers.items()]
        tags = [self._tag(name, value) for name, value in values.items() if isinstance(value, str)]
        self._client.log_batch(self.run_id, metrics=metrics, tags=tags)

    def picture(self, name: str, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def close(self, state: str) -> None:
        self._client.set_terminated(self.run_id, {"done": "FINISHED", "preempted": "KILLED"}.get(state, "FAILED"))


def check_installed(config: RunConfig) -> None:
    """Raise ConfigError if a service that is asked for has no package."""
    for name in ("wandb", "mlflow"):
        if getattr(config.run, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"--{name} needs a package that is not installed: {how_to_install(name)}, or leave it out"
            )


def open_loggers(config: RunConfig, folder: Path) -> BackgroundLoggers:
    """The services that a run asks for; they are reached in a thread. A new run has no `loggers.json` yet."""
    known, flat = _known(folder), config.flat()

    def wandb() -> Logger:
        run_id = known.setdefault("wandb", uuid.uuid4().hex[:12])
        _remember(folder, known)
        return WandbLogger(folder, run_id, flat)

    def mlflow() -> Logger:
        logger = MlflowLogger(folder, known.get("mlflow"), flat)
        known["mlflow"] = logger.run_id
        _remember(folder, known)
        return logger

    makers: dict[str, Callable[[], Logger]] = {"wandb": wandb, "mlflow": mlflow}
    return BackgroundLoggers({name: make for name, make in makers.items() if getattr(config.run, name)})


class BackgroundLoggers:
    """Calls services in a thread, each until it fails; without services there is no thread.

    makers  open each service, by its name
    """

    def __init__(self, makers: Mapping[str, Callable[[], Logger]], close_s: float = _CLOSE_S) -> None:
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(_MOST_WAITING)
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._close_s, self._lost = close_s, False
        self._thread = threading.Thread(target=self._work, args=(dict(makers),), daemon=True, name="loggers")
        if makers:
            self._thread.start()

    def log(self, step: int, values: Values) -> None:
        """Add the metrics of a step."""
        self._call(lambda logger: logger.log(step, values))

    def picture(self, name: str, path: Path) -> None:
        """Add a PNG file."""
        self._call(lambda logger: logger.picture(name, path))

    def warnings(self) -> list[str]:
        """What has gone wrong since the last call, a line each."""
        lines = []
        while not self._warnings.empty():
            lines.append(self._warnings.get())
        return lines

    def close(self, state: str) -> list[str]:
        """End all services, for which it waits a limited time; returns the last warnings."""
        if self._thread.is_alive():
            self._call(lambda logger: logger.close(state))
            try:
                self._calls.put(None, timeout=self._close_s)
                self._thread.join(self._close_s)
            except queue.Full:
                pass
            if self._thread.is_alive():
                self._warnings.put(f"a metric service has not taken everything in {self._close_s:.0f} s")
        return self.warnings()

    def _call(self, function: Callable[[Logger], None]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(function)
        except queue.Full:
            if not self._lost:
                self._lost = True
                self._warnings.put("a metric service is too slow, and misses some entries")

    def _work(self, makers: dict[str, Callable[[], Logger]]) -> None:
        for name in ("wandb", "mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        loggers: list[Logger] = []
        for name, make in makers.items():
            try:
                loggers.append(make())
            except BaseException as error:  # also SystemExit, which services may raise
                self._failed(name, error)
        while (function := self._calls.get()) is not None:
            for logger in list(loggers):
                try:
                    function(logger)
                except BaseException as error:
                    loggers.remove(logger)
                    self._failed(logger.name, error)

    def _failed(self, name: str, error: BaseException) -> None:
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
        self._warnings.put(f"--{name} is left out from here on ({reason}); metrics.jsonl has everything")


def _known(folder: Path) -> dict[str, str]:
    known = read_json_object(folder / FILE_NAME) or {}
    return {name: str(value) for name, value in known.items()}


def _remember(folder: Path, known: Mapping[str, str]) -> None:
    write_atomically(folder / FILE_NAME, json.dumps(known, indent=2) + "\n")
