"""Operators that are not run on the stand-in: convolutions, matrix products and Triton kernels only allocate.

N batch · C, O channels · H, W sides
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.standin.runtime import launch

_observers: list[Callable[[Any, Sequence[Any]], None]] = []
_libraries: list[torch.library.Library] = []  # an override lasts as long as its library


def install() -> None:
    """Replace the CUDA kernels of these operators, and Triton's launches, in this process."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
        for name, function in _OPERATORS.items():
            library.impl(name, function, "CUDA")
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    JITFunction.run = _run_triton


@contextmanager
def before_triton(observe: Callable[[Any, Sequence[Any]], None]) -> Iterator[None]:
    """Call it with every Triton kernel that is launched in this block, and its arguments, before the launch."""
    _observers.append(observe)
    yield
    _observers.remove(observe)


def _run_triton(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    for observe in _observers:
        observe(self, args)
    for value in args:
        if isinstance(value, Tensor) and not (value.is_cuda or value.is_pinned()):
            raise ValueError(f"{self.__name__} is given a tensor of shape {tuple(value.shape)} on {value.device}")
    launch(f"triton {self.__name__}")


def _layout(*tensors: Tensor) -> torch.memory_format:
    """What cuDNN computes in: channels-last if one of the tensors is so laid out."""
    return torch.channels_last if any(map(_is_channels_last, tensors)) else torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    """As `TensorImpl` decides: strides grow in the order C, W, H, N, and are not those of NCHW as well."""
    if tensor.dim() != 4 or tensor.stride(1) == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.size(dim), tensor.stride(dim)
        if size == 0 or stride < smallest or (dim == 0 and smallest == tensor.stride(1)):
            return False
        smallest = stride * max(1, size)
    return True


def _same_types(*tensors: Tensor | None) -> None:
    types = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(types) > 1:
        raise RuntimeError(f"the types differ: {types}")


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    _same_types(x, weight, bias)
    layout = _layout(x, weight)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    launch("cudnn fprop")
    shape = (x.shape[0], weight.shape[0], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _same_types(grad, x, weight)
    layout = _layout(x, weight)
    grad = grad.contiguous(memory_format=layout)
    grads: list[Tensor | None] = [None, None, None]
    if output_mask[0]:
        launch("cudnn dgrad")
        grads[0] = torch.empty_like(x, memory_format=layout)
    if output_mask[1]:
        launch("cudnn wgrad")
        grads[1] = torch.empty_like(weight, memory_format=layout)
    if output_mask[2]:
        launch("cudnn bias gradient")
        grads[2] = torch.empty(weight.shape[0], dtype=x.dtype, device=x.device)
    return grads[0], grads[1], grads[2]


def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, saved mean and deviation, and a reserve of which this keeps nothing."""
    launch("cudnn batch norm")
    reserve = torch.empty(0, dtype=torch.uint8, device=x.device)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), reserve


def _batch_norm_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    deviation: Tensor | None,
    epsilon: float,
    reserve: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    launch("cudnn batch norm gradient")
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _product(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        _same_types(a, b)
        launch(f"cublas {name}")
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=a.device)

    return product


def _product_into(name: str) -> Callable[..., Tensor]:
    def product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        _same_types(a, b, out)
        launch(f"cublas {name}")
        return out

    return product


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _same_types(a, b, c)
    launch("cublas addmm")
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)


def _addmm_into(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    _same_types(a, b, c, out)
    launch("cublas addmm")
    return out


_OPERATORS: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "cudnn_batch_norm": _batch_norm,
    "cudnn_batch_norm_backward": _batch_norm_backward,
    "mm": _product("mm"),
    "mm.out": _product_into("mm"),
    "bmm": _product("bmm"),
    "bmm.out": _product_into("bmm"),
    "addmm": _addmm,
    "addmm.out": _addmm_into,
}
