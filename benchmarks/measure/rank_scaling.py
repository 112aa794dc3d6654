"""Weak scaling of the training step: throughput on one rank and on several, and bytes sent against the lower bound.

Each of R ranks has the same number of images per step, and its own device: a GPU (NCCL), or a thread on one core
(gloo).

    efficiency = images/s of R ranks / (R · images/s of one rank)                               in the same round

Traffic is counted at the loopback device, which all gloo messages pass here: bytes transmitted by all ranks, with
headers, and with any other local traffic of the machine, which the reading of one rank shows. NCCL does not use the
loopback device, so its messages are not counted.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import torch

from benchmarks.measure.harness import Reading, Stopwatch
from benchmarks.measure.plain import Task
from benchmarks.measure.variants import synthetic_views, train_step
from fastmoco.distributed.world import World
from fastmoco.errors import RankLostError, error_named, exit_code
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

HALF_GRADIENTS = {"fp32 gradients": False, "bf16 gradients": True}  # the cases, as --grad-comm names them
RANK_COUNTS = {"cuda": (1, 2, 4, 8), "cpu": (1, 2)}
TIMEOUT_S = 240.0
_GRACE_S = 5.0  # after one rank has failed, for the others to report their errors
_FLOAT = 4


@dataclass(frozen=True)
class Messages:
    """Bytes of a step's messages: each rank's input to the all-reduces, and the keys of all ranks together."""

    gradients: int
    statistics: int
    keys: int

    @staticmethod
    def of(step: TrainStep[Any], task: Task, *, half: bool) -> Messages:
        """The messages of a step with the task's global batch. The loss is reduced together with the statistics."""
        assert step.query.grads is not None
        statistics = step.query.buffers.numel() + step.key.buffers.numel() + 1
        keys = _FLOAT * task.dim * task.batch_size
        return Messages(step.query.grads.numel() * (2 if half else _FLOAT), _FLOAT * statistics, keys)

    def least_bytes(self, ranks: int) -> float:
        """Lower bound on the bytes sent per rank: 2n(R − 1)/R for an all-reduce of n bytes, n(R − 1)/R for a gather."""
        return (2 * (self.gradients + self.statistics) + self.keys) * (ranks - 1) / ranks


@dataclass(frozen=True)
class _Failure:
    """Class and message of the error that ended a rank."""

    kind: str
    message: str


class Ranks:
    """R processes that train together on request, and sleep in between.

        with Ranks(2, task, torch.bfloat16, "cpu", seconds=1) as ranks:
            ranks.read("fp32 gradients")

    task     of one rank: its share of the batch and of the batch norm splits
    seconds  duration of a reading, in whole steps

    Raises RankLostError if a rank dies or does not respond for `timeout_s`; torch.OutOfMemoryError.
    """

    def __init__(
        self,
        size: int,
        task: Task,
        dtype: torch.dtype,
        device: str,
        *,
        seconds: float,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.size = size
        self._images, self._timeout_s = size * task.batch_size, timeout_s
        self._counted = device == "cpu"
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        try:
            with _reserved_port() as port:
                self._start(port, task, dtype, device)
                self._messages: dict[str, Messages] = self._replies()[0]
            self._steps = {}
            for case in HALF_GRADIENTS:
                self._run(case, 1)
                self._steps[case] = max(1, round(seconds / self._run(case, 1)))
        except BaseException:
            self._kill()
            raise

    def _start(self, port: int, task: Task, dtype: torch.dtype, device: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        for rank in range(self.size):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": self.size,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": self.size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            }
            pipe, child_pipe = context.Pipe()
            arguments = (child_pipe, environment, task, dtype, device, self._timeout_s)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            child_pipe.close()  # so that the pipe is closed when the process ends
            self._pipes.append(pipe)
            self.processes.append(process)

    def read(self, case: str) -> Reading:
        """One reading of a case in HALF_GRADIENTS, after a warm-up step."""
        self._run(case, 1)
        steps, before = self._steps[case], loopback_bytes()
        step_s = self._run(case, steps)
        after = loopback_bytes()
        reading = {"step_ms": 1e3 * step_s, "images_per_s": self._images / step_s}
        if self._counted and before is not None and after is not None:
            reading["sent_bytes"] = (after - before) / (steps * self.size)
        return reading | {"least_bytes": self._messages[case].least_bytes(self.size)}

    def _run(self, case: str, steps: int) -> float:
        """Seconds per step of the slowest rank."""
        for pipe in self._pipes:
            with suppress(OSError):  # it has died, which `_replies` reports
                pipe.send((case, steps))
        return max(self._replies()) / steps

    def _replies(self) -> list[Any]:
        """One reply per rank. If a rank has failed, raises its error rather than those that it caused in the others."""
        replies, failures, waiting = dict[int, Any](), dict[int, Exception](), dict(enumerate(self._pipes))
        deadline = time.monotonic() + self._timeout_s
        while waiting and (ready := wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    reply = waiting.pop(rank).recv()
                except (EOFError, OSError):
                    failures[rank] = self._death(rank)
                else:
                    replies[rank] = reply
                    if isinstance(reply, _Failure):
                        failures[rank] = self._failure(rank, reply)
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            lost = {rank for rank in failures if getattr(replies.get(rank), "kind", None) == RankLostError.__name__}
            raise failures[min(failures, key=lambda rank: (rank in lost, rank))]
        if waiting:
            raise RankLostError(f"{self._name(min(waiting))} has not responded for {self._timeout_s:g} s")
        return [replies[rank] for rank in range(self.size)]

    def _death(self, rank: int) -> Exception:
        self.processes[rank].join(_GRACE_S)
        code: int = self.processes[rank].exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return RankLostError(f"{self._name(rank)} {how} during the measurement")

    def _failure(self, rank: int, failure: _Failure) -> Exception:
        if failure.kind == RankLostError.__name__:
            return RankLostError(f"{self._name(rank)} has lost the others during the measurement")
        error = error_named(failure.kind, failure.message)
        if isinstance(error, RankLostError) or exit_code(error) is None:
            return RankLostError(f"{self._name(rank)} failed: {failure.kind}: {failure.message}")
        return error

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.size}"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Shut the ranks down in an orderly way; after a failure, kill them."""
        if kind is None:
            for pipe in self._pipes:
                with suppress(OSError):
                    pipe.send(None)
            for process in self.processes:
                process.join(_GRACE_S)
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            process.join()
            pipe.close()


def rank_counts(device: torch.device) -> tuple[int, ...]:
    """The numbers of ranks for which this machine has a device, or a core, each."""
    devices = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    return tuple(count for count in RANK_COUNTS[device.type] if count <= devices)


def add_efficiency(readings: Mapping[tuple[str, int], list[Reading]]) -> None:
    """Add `efficiency` to the readings by (case, ranks), relative to one rank in the same round, if that was read."""
    for (case, ranks), of_case in readings.items():
        for reading, alone in zip(of_case, readings.get((case, 1), []), strict=False):
            reading["efficiency"] = reading["images_per_s"] / (ranks * alone["images_per_s"])


def loopback_bytes() -> int | None:
    """Bytes sent over the loopback device so far; None if there is no device `lo`."""
    counters = psutil.net_io_counters(pernic=True).get("lo")
    return None if counters is None else counters.bytes_sent


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port for rank 0 to listen on. It stays bound, so that no other process is given it meanwhile."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _rank(
    pipe: Connection, environment: dict[str, Any], task: Task, dtype: torch.dtype, device: str, timeout_s: float
) -> None:
    """Main function of a rank: sends its messages by case, then runs as many steps of a case as requested."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and closes the pipe
    try:
        with World.join(device, timeout_s) as world:
            if world.device.type == "cpu":
                torch.set_num_threads(1)
                keep_freed_memory()
            global_task = replace(task, batch_size=world.size * task.batch_size, bn_splits=world.size * task.bn_splits)
            views = itertools.cycle(_rank_views(task, world, dtype))
            steps, messages = {}, {}
            for case, half in HALF_GRADIENTS.items():
                steps[case], messages[case] = _build(global_task, world, dtype, half, next(views))
            pipe.send(messages)
            while (request := pipe.recv()) is not None:
                case, count = request
                watch = Stopwatch(world.device)
                watch.start()
                for _ in range(count):
                    steps[case](next(views))
                pipe.send(watch.stop())
    except EOFError:  # the parent has ended
        return
    except Exception as error:
        with suppress(OSError):
            pipe.send(_Failure(type(error).__name__, " ".join(str(error).split())))


def _build(
    task: Task, world: World, dtype: torch.dtype, half: bool, views: Views
) -> tuple[Callable[[Views], None], Messages]:
    """The step as in the fastest variant of the device."""
    on_gpu = world.device.type == "cuda"
    torch.manual_seed(0)  # the same weights on all ranks
    step = train_step(task, world, dtype, kernels="triton" if on_gpu else "torch", half_gradients=half)
    run = GraphedStep(step, views) if on_gpu else step
    return lambda views: run(views, task.lr, task.ema_momentum), Messages.of(step, task, half=half)


def _rank_views(task: Task, world: World, dtype: torch.dtype) -> list[Views]:
    """Different noise on each rank, and the same order of all keys on every rank."""
    torch.manual_seed(1 + world.rank)
    batches = synthetic_views(task, world.device, dtype, channels_last=True)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(world.size * task.batch_size, generator=generator).to(world.device) for _ in batches]
    return [Views(v.query, v.key, order, v.index) for v, order in zip(batches, orders, strict=True)]
