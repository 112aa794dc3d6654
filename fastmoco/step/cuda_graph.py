"""The training step as a CUDA graph: captured once, then replayed with one launch per step.

B batch · S side of a view
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastmoco.errors import ConfigError
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

WARM_UP = 3  # runs before the capture, for compilation, autotuning and the allocation of workspaces


class Graph(Protocol):
    """The operations that a GraphedStep needs; tests replace them by ones that need no GPU."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Execute `run` on the stream of the capture."""
        ...

    def capture(self, run: Callable[[], None]) -> None:
        """Record what `run` launches, without executing it. Raises RuntimeError if it cannot be captured."""
        ...

    def replay(self) -> None:
        """Execute the recorded work on the current contents of the same memory."""
        ...


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, warmed up and captured on one side stream.

    Both on the same stream: libraries keep workspaces per stream, and autograd accumulates a gradient on the stream
    that produced it. The capture rejects unsafe calls of this thread only (`thread_local`), since loader threads may
    pin memory or query events at any time; meanwhile this thread must not launch work on another stream. A pipeline
    that prefetches does so inside `next`, so it is idle while a step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(current)  # torch's context manager does not where ending the capture fails

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """`TrainStep.run` as one graph: `step(views, lr, ema_momentum)` gives the same bits as the step itself.

    It includes forward, loss, backward, update, enqueue, sums and loss scaling. Views, lr and ema_momentum are copied
    into the graph's input buffers: 3 MB for 512 pairs of 32 pixels in bfloat16, 1 µs at 4 TB/s. State stays in the same
    memory: `read_metrics`, `state_dict` and `load_state_dict` of the step may be called between steps.

    step     the step to capture. It is warmed up with `example`, and every tensor changed by that is restored
    example  views with the shapes, types and layout of all later ones
    graph    by default a CUDA graph

    Raises ConfigError if the step is not on a GPU or cannot be captured; there is no silent fallback to eager mode.
    """

    def __init__(self, step: TrainStep, example: Views, graph: Graph | None = None) -> None:
        if graph is None:
            if step.device.type != "cuda":
                raise ConfigError(f"--cuda-graph on needs a GPU, and the device is {step.device}: use --cuda-graph off")
            graph = CudaGraph(step.device)
        self._graph = graph
        self._inputs = [tensor.clone() for tensor in _tensors(example)]
        views = Views(*self._inputs)

        changed = step.changed_tensors()
        before = [tensor.clone() for tensor in changed]
        for _ in range(WARM_UP):
            graph.warm_up(lambda: step.run(views))
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        del before  # as much memory as the state; the capture may need it
        try:
            graph.capture(lambda: step.run(views))
        except RuntimeError as error:
            cause = _cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().partition("\n")[0]
            raise ConfigError(
                f"the training step cannot be captured as a CUDA graph ({reason}): use --cuda-graph off"
            ) from error
        self.step = step

    def __call__(self, views: Views, lr: float, ema_momentum: float) -> None:
        """Train on one batch without waiting for the device. Raises ConfigError if `views` are not as captured."""
        for name, tensor, captured in zip(Views.__slots__, _tensors(views), self._inputs, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != (captured.shape, captured.dtype, captured.device):
                raise ConfigError(
                    f"views.{name} is {_describe(tensor)}, and the CUDA graph was captured with {_describe(captured)}: "
                    "do not change the batch, or use --cuda-graph off"
                )
        self.step.round_if_changed()
        for tensor, captured in zip(_tensors(views), self._inputs, strict=True):
            captured.copy_(tensor, non_blocking=True)
        self.step.lr.fill_(lr)
        self.step.ema_momentum.fill_(ema_momentum)
        self._graph.replay()


def _cause(error: BaseException) -> BaseException:
    """The original error: ending a failed capture raises another one, which does not name the cause."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _tensors(views: Views) -> tuple[Tensor, ...]:
    return views.query, views.key, views.key_order, views.index


def _describe(tensor: Tensor) -> str:
    shape = "×".join(map(str, tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
