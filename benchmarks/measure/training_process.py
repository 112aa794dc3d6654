"""A training run in its own process, measured on request, with tuned, fixed or passive CPU threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.end_to_end import Images, open_case
from benchmarks.measure.engines import our_engine
from benchmarks.measure.harness import Reading
from benchmarks.measure.plain import Task
from benchmarks.measure.sample_data import open_index
from benchmarks.measure.variants import CONFIGS
from fastmoco.config import RunConfig
from fastmoco.device import DTYPES
from fastmoco.errors import RankLostError
from fastmoco.recipes import recipe
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.resolve import resolve
from fastmoco.run.thread_count import ThreadCount

TUNED, FIXED, PASSIVE = "tuned", "fixed", "passive"
ENVIRONMENT = {TUNED: {}, FIXED: {}, PASSIVE: {"OMP_WAIT_POLICY": "PASSIVE"}}
WARM_UP_STEPS = 3
TIMEOUT_S = 240.0  # for opening, or on top of the duration of a reading


@dataclass(frozen=True)
class TrainingSettings:
    """The default recipe's step at another size, and the loader's workers."""

    batch_size: int
    width: float
    workers: int

    @property
    def task(self) -> Task:
        return replace(CONFIGS["cifar"], batch_size=self.batch_size, queue=32 * self.batch_size, bn_splits=2)

    def run_config(self, data: str) -> RunConfig:
        """The default recipe on these images."""
        return recipe("shapes").replace(
            data=data,
            pipeline="torch",
            workers=self.workers,
            width=self.width,
            stem=self.task.stem,
            crop_size=self.task.side,
            batch_size=self.task.batch_size,
            moco_k=self.task.queue,
            bn_splits=self.task.bn_splits,
            allow_large_queue=True,  # the cost of a queue does not depend on its content
        )


class TrainingProcess:
    """A process that trains on request, and sleeps in between. Raises the error that prevented it from opening."""

    def __init__(self, pipeline: str, threads: str, data: str, settings: TrainingSettings, seconds: float) -> None:
        self.name, self._seconds = f"{pipeline} {threads}", seconds
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_train, args=(child_pipe, pipeline, threads, data, settings))
        before = dict(os.environ)
        try:
            os.environ.update(ENVIRONMENT[threads])
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        child_pipe.close()
        try:
            self._reply(TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise

    def read(self) -> Reading:
        """images/s now, and the number of threads at the end. Raises RankLostError if the process has died."""
        with suppress(OSError):  # it has died, which `_reply` reports
            self._pipe.send(self._seconds)
        return self._reply(self._seconds + TIMEOUT_S)

    def _reply(self, timeout_s: float) -> Any:
        try:
            reply = self._pipe.recv() if self._pipe.poll(timeout_s) else None
        except (EOFError, OSError):
            reply = None
        if reply is None:
            raise RankLostError(f"the process of {self.name} has died or has not responded for {timeout_s:g} s")
        if isinstance(reply, Exception):
            raise reply
        return reply

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _train(pipe: Connection, pipeline: str, threads: str, data: str, settings: TrainingSettings) -> None:
    """Main function of the process: reports when it is ready, then trains for the requested number of seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and closes the pipe
    device, task = torch.device("cpu"), settings.task
    try:
        with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch, ExitStack() as stack:
            images = Images(open_index(data, task.side, None, Path(scratch)), Path(scratch), settings.workers)
            config, _ = resolve(settings.run_config(data), images.index, device)
            engine = our_engine(config, task, images.index, device)
            dtype = DTYPES[config.run.amp]
            case = open_case(pipeline, images, task, device, dtype, settings.workers, engine)
            stack.callback(case.close)
            keep_freed_memory()
            batches = case.batches()
            for _ in range(WARM_UP_STEPS):
                engine.step(next(batches))
            pipe.send("ready")
            while (seconds := pipe.recv()) is not None:
                count = ThreadCount(torch.get_num_threads()) if threads == TUNED else None
                steps, began = 0, time.perf_counter()
                for views in batches if count is None else count.steps(batches):
                    engine.step(views)
                    steps += 1
                    if time.perf_counter() - began >= seconds:
                        break
                elapsed_s = time.perf_counter() - began
                used = torch.get_num_threads() if count is None else count.threads
                if count is not None:
                    count.close()
                pipe.send({"images_per_s": steps * task.batch_size / elapsed_s, "threads": float(used)})
    except EOFError:  # the parent has ended
        return
    except Exception as error:
        with suppress(OSError):
            pipe.send(error)
