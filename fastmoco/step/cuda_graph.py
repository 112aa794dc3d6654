"""The training step as one CUDA graph: captured once, then replayed, so that the host launches one thing a step.

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

WARM_UP = 3  # runs before the capture: compilation, autotuning and workspaces happen in the first ones


class Graph(Protocol):
    """What a GraphedStep needs of a device; in tests a stand-in without one."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Executes `run` where it will be captured."""
        ...

    def capture(self, run: Callable[[], None]) -> None:
        """Records what `run` launches, without executing it. Raises RuntimeError where that is impossible."""
        ...

    def replay(self) -> None:
        """Executes what was recorded, on the current contents of the same memory."""
        ...


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, warmed up and captured in one stream of its own.

    One stream for both: libraries keep workspaces by stream, and autograd accumulates a gradient in the stream that
    made it. The capture refuses unsafe calls of this thread only (`thread_local`), since threads of a loader may pin
    memory or ask for events at any time; but nothing may be launched from this thread in another stream meanwhile. A
    pipeline that works one batch ahead does so inside `next`, so it is at rest whenever a step is running.
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
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """`TrainStep.run` as one graph: `step(views, lr, ema_momentum)` does what the step itself would, bit for bit.

    Forward, loss, backward, update, enqueue, sums and loss scaling are all in it. Views, lr and ema_momentum are copied
    to where the graph reads them: 3 MB for 512 pairs of 32 pixels in bfloat16, 1 µs at 4 TB/s. State lies where it
    did: `read_metrics`, `state_dict` and `load_state_dict` of the step go on working, and may be called between steps.

    step     the step to capture. It is warmed up with `example`; every tensor that this changes is put back
    example  views of the shapes, types and layout of all that will follow
    graph    by default a CUDA graph

    Raises ConfigError where the step is not on a GPU, or where something in it cannot be captured: nothing then runs
    without the graph unasked.
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
            why = str(cause).strip().partition("\n")[0]
            raise ConfigError(
                f"the training step cannot be captured as a CUDA graph ({why}): use --cuda-graph off"
            ) from error
        self.step = step

    def __call__(self, views: Views, lr: float, ema_momentum: float) -> None:
        """Trains on one batch, without waiting for the device. Raises ConfigError where `views` are not as captured."""
        for name, tensor, own in zip(Views.__slots__, _tensors(views), self._inputs, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != (own.shape, own.dtype, own.device):
                raise ConfigError(
                    f"views.{name} is {_describe(tensor)}, and the CUDA graph was captured with {_describe(own)}: "
                    "keep the batch, or use --cuda-graph off"
                )
        for tensor, own in zip(_tensors(views), self._inputs, strict=True):
            own.copy_(tensor, non_blocking=True)
        self.step.lr.fill_(lr)
        self.step.ema_momentum.fill_(ema_momentum)
        self._graph.replay()


def _cause(error: BaseException) -> BaseException:
    """What was refused first: ending a capture that has failed raises an error of its own, which only says so."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _tensors(views: Views) -> tuple[Tensor, ...]:
    return views.query, views.key, views.key_order, views.index


def _describe(tensor: Tensor) -> str:
    shape = "×".join(map(str, tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
