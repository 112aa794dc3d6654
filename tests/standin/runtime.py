"""Control of the stand-in CUDA runtime from the process that runs on it, and its log of calls.

with CallLog() as log:
    step(views, lr, ema_momentum)
log.host_waits()  # []
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, Self

import torch

_WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"})
# These wait for all work of the device, or may.
_ALLOCATIONS = frozenset(
    {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaHostRegister", "cudaHostUnregister"}
)

MOST_SHOWN = 20


@cache
def _native() -> ctypes.CDLL:
    native = ctypes.CDLL(None)
    if not hasattr(native, "standin_start"):
        raise RuntimeError("this process does not run on the stand-in: see tests/standin/run.py")
    native.standin_stop.restype = ctypes.c_char_p
    native.standin_nodes.restype = ctypes.c_size_t
    native.standin_launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    native.standin_mark.argtypes = [ctypes.c_char_p]
    native.standin_set_memory.argtypes = [ctypes.c_size_t]
    return native


def set_capability(major: int, minor: int) -> None:
    """The compute capability of the device; call it before torch initialises CUDA."""
    _native().standin_set_capability(major, minor)


def set_memory(size: int) -> None:
    """The memory of the device in bytes, 85e9 unless set. Allocations beyond it fail as on a device."""
    _native().standin_set_memory(size)


def set_lag(steps: int) -> None:
    """How far the device is behind: when a step begins, it has done what was issued before the step `steps` earlier.

    Queries tell of work that it has not done, and waits for it are over at once. 0, the default: it does all at once.
    """
    _native().standin_set_lag(steps)


def violations() -> int:
    """Number of calls so far that a capture forbids."""
    return _native().standin_violations()


def graph_nodes() -> int:
    """Nodes of the last graph that was captured."""
    return _native().standin_nodes()


def launch(name: str, stream: int | None = None) -> None:
    """Log a launch in a stream, by default the current one, and count it in a capture."""
    _native().standin_launch(name.encode(), torch.cuda.current_stream().cuda_stream if stream is None else stream)


def step_begins() -> None:
    """Mark the start of a training step in the log, and let the device make progress (`set_lag`)."""
    _native().standin_step_begins()
    mark("step")


def mark(text: str) -> None:
    """Write a line of one's own into the log."""
    _native().standin_mark(text.encode())


class Call(NamedTuple):
    """One call of the runtime.

    name    the function; or "kernel", "mark", "violation", "captured host copy", or "outside capture" for work of the
            capturing thread in another stream
    detail  kernel: its name; copy: direction, bytes, "pinned" or "pageable"; event: its address
    thread  "main", or the name of the thread, such as "pt_autograd_0"
    """

    name: str
    detail: str
    stream: str
    thread: str

    def __str__(self) -> str:
        return f"{self.name} {self.detail} ({self.thread})"


class Calls(list[Call]):
    """Consecutive calls of the runtime."""

    def named(self, *names: str) -> Calls:
        return Calls(call for call in self if call.name in names)

    def kernels(self) -> Calls:
        return self.named("kernel")

    def device_copies(self) -> Calls:
        """Copies within the device, and memory that is set."""
        return Calls(call for call in self if call.detail.startswith("D2D") or call.name == "cudaMemsetAsync")

    def host_copies(self) -> Calls:
        """Asynchronous copies between host and device; the others are `host_waits`."""
        return Calls(call for call in self.named("cudaMemcpyAsync") if not call.detail.startswith("D2D"))

    def host_waits(self) -> Calls:
        """Calls in which the host waits for the device. Asynchronous copies do with pageable memory."""
        return Calls(call for call in self if call.name in _WAITS or _is_staged(call))

    def allocations(self) -> Calls:
        """Allocations of device and pinned memory, and releases: served from torch's cache, they do not appear."""
        return Calls(call for call in self if call.name in _ALLOCATIONS)

    def of_step(self) -> Calls:
        """Calls of the threads that train: the main one and autograd's."""
        return Calls(call for call in self if call.thread == "main" or call.thread.startswith("pt_autograd"))

    def split(self, marked: str) -> list[Calls]:
        """The calls before the first such mark, between each two, and after the last."""
        parts = [Calls()]
        for call in self:
            if call.name == "mark" and call.detail == marked:
                parts.append(Calls())
            else:
                parts[-1].append(call)
        return parts

    def counts(self) -> dict[str, int]:
        return dict(Counter(call.name for call in self))


def _is_staged(call: Call) -> bool:
    return call.name == "cudaMemcpyAsync" and call.detail.endswith("pageable")


def texts(calls: Iterable[Call]) -> list[str]:
    """For a report: the first of them."""
    return [str(call) for call in itertools.islice(calls, MOST_SHOWN)]


class CallLog(Calls):
    """The calls of a `with` block, of every thread. One log at a time."""

    def __enter__(self) -> Self:
        assert threading.current_thread() is threading.main_thread()
        _native().standin_start()
        return self

    def __exit__(self, *error: object) -> None:
        text: str = _native().standin_stop().decode(errors="replace")
        self[:] = [Call(*line.split("|")) for line in text.splitlines()]
