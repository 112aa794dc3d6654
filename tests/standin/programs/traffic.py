"""FLOPs and memory traffic of the training step, launch by launch, from the operators and kernels that it really runs.

    python -m tests.standin.run traffic [--add FAULT] MODE...

Modes and faults are those of programs/step.py. Every launch is assumed to read its inputs from memory once and to write
its outputs once, in whole, with no reuse of caches between launches. That is the assumption of
benchmarks/measure/traffic.py, which counts from the model what a step needs; this counts what it does. The estimated
time of a launch is that of its arithmetic or of its traffic, whichever is longer, plus a gap. It is an estimate, and
measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastmoco.model.operator import NAMESPACE
from tests.standin import compiler, operators, runtime
from tests.standin.programs.step import EMA_MOMENTUM, FAULTS, LR, MODES, WARM_UP, added, build
from tests.standin.runtime import CallLog, Calls

FLOP_PER_S, BYTES_PER_S = 790e12, 4.3e12  # one H200: a large bf16 matrix product, and a large copy
GAP_S = 1.5e-6  # between two kernels of a graph that depend on each other, assumed

# Operators that write a tensor without reading it, though by their schema they change it.
_ONLY_WRITTEN = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
# Arguments that a Triton kernel both reads and writes; all others are either read or written.
_READ_AND_WRITTEN = {"_update_kernel": {"query_ptr", "key_ptr", "buffer_ptr"}}
# FLOPs of Triton kernels with matrix products, by their arguments.
_KERNEL_FLOPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "_part_kernel": lambda given: 4.0 * given["q_ptr"].numel() * given["queue_ptr"].shape[0],
    "product_kernel": lambda given: 2.0 * given["y_ptr"].numel() * given["matrix_ptr"].shape[1],
    "product_gradient_kernel": lambda given: 2.0 * given["x_grad_ptr"].numel() * given["matrix_ptr"].shape[0],
    "matrix_gradient_kernel": lambda given: 2.0 * given["x_ptr"].numel() * given["grad_ptr"].shape[1],
}


class Cost(NamedTuple):
    """Of one launch."""

    bytes: float
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.flops / FLOP_PER_S, self.bytes / BYTES_PER_S)


@dataclass
class Work:
    """An operator or a Triton kernel, and how many launches it takes."""

    name: str
    costs: list[Cost] = field(default_factory=list)
    launches: int = 0

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs) + self.launches * GAP_S


class Recorder(TorchDispatchMode):
    """Records the operators and Triton kernels in its `with` block; the log marks where each begins."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:  # what its Python function runs is recorded instead
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        work = self.begin(func.overloadpacket.__name__)
        result = func(*args, **kwargs)
        work.costs = _costs(func, args, kwargs, result)
        return result

    def begin(self, name: str) -> Work:
        """The launches from now on belong to this work."""
        runtime.mark(f"work {len(self.works)}")
        self.works.append(Work(name))
        return self.works[-1]

    def kernel(self, kernel: Any, arguments: Sequence[Any]) -> None:
        """Record a Triton kernel that is about to be launched."""
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        twice = _READ_AND_WRITTEN.get(kernel.__name__, set())
        sizes = _Sizes()
        for name, value in given.items():
            sizes.add(value, 2 if name in twice else 1)
        flops = _KERNEL_FLOPS.get(kernel.__name__, lambda _: 0.0)(given)
        self.begin(kernel.__name__).costs = [Cost(sizes.total(), flops)]

    def attribute(self, log: Calls) -> list[Work]:
        """Count the launches of each work, and return those that have any."""
        work: Work | None = None
        for call in log:
            if call.name == "mark" and call.detail.startswith("work "):
                work = self.works[int(call.detail.split()[1])]
            elif Calls([call]).kernels() or Calls([call]).device_copies():
                assert work is not None, f"{call} belongs to no operator"
                work.launches += 1
        return [work for work in self.works if work.launches]


class _Sizes:
    """Bytes of tensors, each counted once however often it is given."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, int], int] = {}

    def add(self, value: Any, times: int = 1) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.is_cuda and tensor.numel():
                size = _distinct_bytes(tensor)
                self._sizes[tensor.data_ptr(), size] = times * size

    def total(self) -> float:
        return float(sum(self._sizes.values()))


def _distinct_bytes(tensor: Tensor) -> int:
    """A broadcast dimension is read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


def _costs(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> list[Cost]:
    """Inputs and outputs of an operator; the two gradients of a convolution are two kernels."""
    name, count = func.overloadpacket.__name__, flop_registry.get(func.overloadpacket)
    flops = 0.0 if count is None else float(count(*args, **kwargs, out_val=result))
    if name == "convolution_backward":
        grad, x, weight = args[:3]
        kernels = [(weight, result[0]), (x, result[1])]
        wanted = [pair for pair in kernels if pair[1] is not None]
        return [Cost(_total(grad, *pair), flops / len(wanted)) for pair in wanted]
    sizes = _Sizes()
    sizes.add((result, args, kwargs))
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            sizes.add(value, 1 if name in _ONLY_WRITTEN or argument.is_out else 2)
    return [Cost(sizes.total(), flops)]


def _total(*tensors: Tensor) -> float:
    sizes = _Sizes()
    sizes.add(tensors)
    return sizes.total()


def record(mode: str) -> list[Work]:
    """The work of the third step."""
    step, views = build(mode)
    for _ in range(WARM_UP):
        step(views, LR, EMA_MOMENTUM)
    recorder = Recorder()
    with operators.before_triton(recorder.kernel), CallLog() as log, recorder:
        step(views, LR, EMA_MOMENTUM)
    return recorder.attribute(log)


def report(works: list[Work]) -> dict[str, Any]:
    """Totals, and the operators and kernels by name, in the order of their estimated time."""
    by_name: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        by_name[work.name].append(work)
    rows = {name: _totals(of_name) for name, of_name in by_name.items()}
    return _totals(works) | {"rows": dict(sorted(rows.items(), key=lambda row: -row[1]["ms"]))}


def _totals(works: list[Work]) -> dict[str, float]:
    costs = [cost for work in works for cost in work.costs]
    return {
        "launches": sum(work.launches for work in works),
        "gb": sum(cost.bytes for cost in costs) / 1e9,
        "tflop": sum(cost.flops for cost in costs) / 1e12,
        "ms": sum(work.seconds for work in works) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--add", choices=FAULTS)
    parser.add_argument("modes", nargs="+", choices=MODES)
    options = parser.parse_args()
    operators.install()
    compiler.install()
    reports = {mode: report(record(mode)) for mode in options.modes}
    if options.add is not None:
        with added(FAULTS[options.add]):
            reports |= {f"{mode}+{options.add}": report(record(mode)) for mode in options.modes}
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
