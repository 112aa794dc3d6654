"""The training step on one rank and on several: how fast, and how much is sent beside the least that has to be.

Weak scaling: each of R ranks has the same number of images a step, and a device of its own: a GPU (NCCL), or one core's
thread (gloo). So R ranks on R devices stand beside one rank on one of them:

    efficiency = images/s of R ranks / (R · images/s of one rank)                               in the same round

What is sent is counted at the loopback device, which all messages of gloo pass here: bytes transmitted by all ranks,
with their headers, and with whatever else this machine tells itself meanwhile, which one rank alone shows. Messages of
NCCL do not pass it, and are not counted.
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.harness import Reading, Stopwatch
from benchmarks.measure.ladder import synthetic_views, train_step
from benchmarks.measure.plain import Task
from fastmoco.distributed.world import World
from fastmoco.errors import RankLostError, error_named, exit_code
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

HALF_GRADIENTS = {"fp32 gradients": False, "bf16 gradients": True}  # the cases, as --grad-comm names them
RANK_COUNTS = {"cuda": (1, 2, 4, 8), "cpu": (1, 2)}
TIMEOUT_S = 240.0
_LAST_WORDS_S = 5.0  # after one rank is gone, for the others to say what they know
_TRANSMITTED = 8  # which column of /proc/net/dev
_FLOAT = 4


@dataclass(frozen=True)
class Messages:
    """Bytes of a step's messages: what each rank puts into the all-reduces, and all ranks' keys in all."""

    gradients: int
    statistics: int
    keys: int

    @staticmethod
    def of(step: TrainStep[Any], task: Task, *, half: bool) -> Messages:
        """Of a step whose whole batch is the task's. The loss travels with the statistics."""
        assert step.query.grads is not None
        statistics = step.query.buffers.numel() + step.key.buffers.numel() + 1
        keys = _FLOAT * task.dim * task.batch_size
        return Messages(step.query.grads.numel() * (2 if half else _FLOAT), _FLOAT * statistics, keys)

    def least_bytes(self, ranks: int) -> float:
        """What every rank has to send at least: 2n(R − 1)/R for an all-reduce of n bytes, n(R − 1)/R for a gather."""
        return (2 * (self.gradients + self.statistics) + self.keys) * (ranks - 1) / ranks


@dataclass(frozen=True)
class _Failure:
    """Why a rank ended: its error's class and message."""

    kind: str
    message: str


class Ranks:
    """R processes that train together when they are asked to, and sleep in between.

        with Ranks(2, task, torch.bfloat16, "cpu", seconds=1) as ranks:
            ranks.read("fp32 gradients")

    task     of one rank: its share of the batch, and of the batch norm splits
    seconds  how long a reading takes, in whole steps

    Raises RankLostError where a rank dies, or does not answer for `timeout_s`; torch.OutOfMemoryError.
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
        self._ends: list[Connection] = []
        self.processes: list[Any] = []
        try:
            with _reserved_port() as port:
                self._start(port, task, dtype, device)
                self._messages: dict[str, Messages] = self._answers()[0]
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
            end, theirs = context.Pipe()
            arguments = (theirs, environment, task, dtype, device, self._timeout_s)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that it is at its end with the process
            self._ends.append(end)
            self.processes.append(process)

    def read(self, case: str) -> Reading:
        """One reading of a key of HALF_GRADIENTS, after a step to wake up."""
        self._run(case, 1)
        steps, before = self._steps[case], loopback_bytes()
        step_s = self._run(case, steps)
        after = loopback_bytes()
        reading = {"step_ms": 1e3 * step_s, "images_per_s": self._images / step_s}
        if self._counted and before is not None and after is not None:
            reading["sent_bytes"] = (after - before) / (steps * self.size)
        return reading | {"least_bytes": self._messages[case].least_bytes(self.size)}

    def _run(self, case: str, steps: int) -> float:
        """Seconds of a step, on the rank that took the longest."""
        for end in self._ends:
            with suppress(OSError):  # it is gone, as its answer will say
                end.send((case, steps))
        return max(self._answers()) / steps

    def _answers(self) -> list[Any]:
        """One of every rank. Raises what ended one of them, rather than what the others make of that."""
        answers, failures, waiting = dict[int, Any](), dict[int, Exception](), dict(enumerate(self._ends))
        deadline = time.monotonic() + self._timeout_s
        while waiting and (ready := wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank, end in waiting.items() if end in ready]:
                try:
                    answer = waiting.pop(rank).recv()
                except (EOFError, OSError):
                    failures[rank] = self._death(rank)
                else:
                    answers[rank] = answer
                    if isinstance(answer, _Failure):
                        failures[rank] = self._failure(rank, answer)
            if failures:
                deadline = min(deadline, time.monotonic() + _LAST_WORDS_S)
        if failures:
            lost = {rank for rank in failures if getattr(answers.get(rank), "kind", None) == RankLostError.__name__}
            raise failures[min(failures, key=lambda rank: (rank in lost, rank))]
        if waiting:
            raise RankLostError(f"{self._name(min(waiting))} has not answered for {self._timeout_s:g} s")
        return [answers[rank] for rank in range(self.size)]

    def _death(self, rank: int) -> Exception:
        self.processes[rank].join(_LAST_WORDS_S)
        code: int = self.processes[rank].exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return RankLostError(f"{self._name(rank)} {how} while it was measured")

    def _failure(self, rank: int, failure: _Failure) -> Exception:
        if failure.kind == RankLostError.__name__:
            return RankLostError(f"{self._name(rank)} has lost the others while it was measured")
        error = error_named(failure.kind, failure.message)
        if isinstance(error, RankLostError) or exit_code(error) is None:
            return RankLostError(f"{self._name(rank)} failed: {failure.kind}: {failure.message}")
        return error

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.size}"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets the ranks take leave of each other; after a failure there is nothing to wait for."""
        if kind is None:
            for end in self._ends:
                with suppress(OSError):
                    end.send(None)
            for process in self.processes:
                process.join(_LAST_WORDS_S)
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, end in zip(self.processes, self._ends, strict=True):
            process.join()
            end.close()


def rank_counts(device: torch.device) -> tuple[int, ...]:
    """How many ranks this machine has a device or a core each for."""
    most = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    return tuple(count for count in RANK_COUNTS[device.type] if count <= most)


def add_efficiency(readings: Mapping[tuple[str, int], list[Reading]]) -> None:
    """To the readings by (case, ranks), from that of one rank in the same round."""
    for (case, ranks), own in readings.items():
        for reading, alone in zip(own, readings[case, 1], strict=True):
            reading["efficiency"] = reading["images_per_s"] / (ranks * alone["images_per_s"])


def loopback_bytes() -> int | None:
    """What this machine has sent to itself so far; None where the system does not count it."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    devices = (line.strip().partition(":") for line in lines)
    return next((int(counts.split()[_TRANSMITTED]) for name, _, counts in devices if name == "lo"), None)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port for rank 0 to listen on, which nobody else is given meanwhile: it is bound, and nobody listens yet."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _rank(
    end: Connection, environment: dict[str, Any], task: Task, dtype: torch.dtype, device: str, timeout_s: float
) -> None:
    """A process: first says what its messages are by case, then runs as many steps of a case as it is asked to."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks is interrupted, and closes the pipe
    try:
        with World.join(device, timeout_s) as world:
            if world.device.type == "cpu":
                torch.set_num_threads(1)
                keep_freed_memory()
            whole = replace(task, batch_size=world.size * task.batch_size, bn_splits=world.size * task.bn_splits)
            views = itertools.cycle(_shares(task, world, dtype))
            steps, messages = {}, {}
            for case, half in HALF_GRADIENTS.items():
                steps[case], messages[case] = _build(whole, world, dtype, half, next(views))
            end.send(messages)
            while (asked := end.recv()) is not None:
                case, count = asked
                watch = Stopwatch(world.device)
                watch.start()
                for _ in range(count):
                    steps[case](next(views))
                end.send(watch.stop())
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        with suppress(OSError):
            end.send(_Failure(type(error).__name__, " ".join(str(error).split())))


def _build(
    whole: Task, world: World, dtype: torch.dtype, half: bool, views: Views
) -> tuple[Callable[[Views], None], Messages]:
    """The step as the ladder's best rung of the device has it."""
    on_gpu = world.device.type == "cuda"
    torch.manual_seed(0)  # the same weights on all ranks
    step = train_step(whole, world, dtype, kernels="triton" if on_gpu else "torch", half_gradients=half)
    run = GraphedStep(step, views) if on_gpu else step
    return lambda views: run(views, whole.lr, whole.ema_momentum), Messages.of(step, whole, half=half)


def _shares(task: Task, world: World, dtype: torch.dtype) -> list[Views]:
    """This rank's own noise, and one order of all ranks' keys."""
    torch.manual_seed(1 + world.rank)
    shares = synthetic_views(task, world.device, dtype, channels_last=True)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(world.size * task.batch_size, generator=generator).to(world.device) for _ in shares]
    return [Views(v.query, v.key, order, v.index) for v, order in zip(shares, orders, strict=True)]
