"""Functions that launch kernels, as operators of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastmoco"


class Operator:
    """`function` as an operator `fastmoco::NAME`, which torch.compile keeps as one opaque call.

    A plain call outside of the compiler, where the dispatcher would cost more than the launches take.

    schema   of the operator, as `torch.library.custom_op` reads it
    fake     returns tensors of the shapes, types and strides of the result, without computing it
    mutates  names of the arguments that are changed in place

    Not `torch.library.triton_op`, into which the compiler sees: the counters of arrived programs, which are kept from
    launch to launch, would be constants of the graph that a kernel changes, and what Triton's interpreter runs cannot
    be inlined. It would gain nothing: Inductor fuses nothing into other kernels, and in a CUDA graph a call costs the
    host nothing.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        mutates: Sequence[str] = (),
    ) -> None:
        self.function = function
        self.definition = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=mutates, schema=schema)
        self.definition.register_fake(fake)
        self.operator: Any = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, x: Tensor, *args: Any) -> Any:
        traced = torch.compiler.is_compiling() or type(x) is not Tensor
        return self.operator(x, *args) if traced else self.function(x, *args)
