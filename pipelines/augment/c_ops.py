"""Colour augmentation on a CPU as one compiled loop: the results of `augment.torch_ops`, bit for bit, in less time.

V views · S side of a crop

The loop, `colour.c`, is compiled when it is first used. Where that is not possible, `torch_ops` does the work.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines import c_library
from pipelines.augment import torch_ops
from pipelines.augment.params import ORDERS, Column, blur_taps, sample_params
from pipelines.augment.presets import BYOL, V1, Augmentation
from pipelines.c_library import NoLibraryError
from pipelines.cpu_threads import parallel_for

SOURCE = Path(__file__).with_name("colour.c")
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_TASKS_PER_THREAD = 4  # views take different times
_MIN_TASK_PIXELS = 2**16  # a third of a millisecond, ten times what it takes to start a task
_CHECKED = 24, 20  # views and their side: all orders of the jitter


class Batch(ctypes.Structure):
    """`batch` of colour.c: the arguments of `apply`, and sizes.

    strides        of the view, the row, the column and the channel of a crop, in bytes
    weights        (V, radius + 1) float32, as of `torch_ops.half_kernels`; any for views that are not blurred
    scale, offset  (3,) float32, as of `torch_ops.normalisation`
    dtype          position in _DTYPES
    """

    _fields_ = (
        ("crops", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("source", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("side", ctypes.c_int32),
        ("radius", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("grey_first", ctypes.c_int32),
    )


class Loop(NamedTuple):
    """The compiled loop, or else None and the reason in one line."""

    library: ctypes.CDLL | None
    reason: str = ""


def apply(
    crops: Tensor,
    params: np.ndarray,
    augmentation: Augmentation,
    dtype: torch.dtype,
    source: np.ndarray | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`torch_ops.apply` on a CPU: by the compiled loop where there is one, for three channels."""
    library = loop().library
    if library is None or dtype not in _DTYPES or crops.shape[3] != 3:
        return torch_ops.apply(crops, params, augmentation, dtype, source, out)
    return apply_by(library, crops, params, augmentation, dtype, source, out)


@cache
def loop() -> Loop:
    """Compiles the loop, or loads it, when it is first called."""
    try:
        return Loop(c_library.load(SOURCE, check))
    except NoLibraryError as error:
        return Loop(None, str(error))


def apply_by(
    library: ctypes.CDLL,
    crops: Tensor,
    params: np.ndarray,
    augmentation: Augmentation,
    dtype: torch.dtype,
    source: np.ndarray | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`torch_ops.apply` by a library of colour.c, on as many threads as torch has. On a CPU, of _DTYPES."""
    count, side = len(params), crops.shape[1]
    if count == 0:
        return torch_ops.apply(crops, params, augmentation, dtype, source, out)
    source = np.arange(count) if source is None else np.ascontiguousarray(source, dtype=np.int64)
    params = np.ascontiguousarray(params, dtype=np.float32)
    if out is None:
        out = torch.empty((count, side, side, 3), dtype=dtype).permute(0, 3, 1, 2)
    assert crops.shape == (len(crops), side, side, 3), crops.shape
    assert crops.dtype == torch.uint8, crops.dtype
    assert crops.device == out.device == torch.device("cpu"), (crops.device, out.device)
    assert params.shape == (count, len(Column)), params.shape
    assert source.shape == (count,), source.shape
    assert 0 <= source.min() <= source.max() < len(crops), (source.min(), source.max(), len(crops))
    assert (out.shape, out.dtype) == ((count, 3, side, side), dtype), (out.shape, out.dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)

    radius, sigma = blur_taps(augmentation, side) // 2, params[:, Column.BLUR_SIGMA]
    weights = np.zeros((count, radius + 1), dtype=np.float32)
    weights[sigma > 0] = torch_ops.half_kernels(sigma[sigma > 0], radius)
    arrays = [source, params, weights, *torch_ops.normalisation(augmentation)]
    addresses = [array.ctypes.data for array in arrays]
    numbers = side, radius, _DTYPES.index(dtype), augmentation.grey_first
    batch = ctypes.byref(Batch(crops.data_ptr(), crops.stride(), *addresses, out.data_ptr(), *numbers))
    library.scratch_floats.restype = ctypes.c_int64
    floats = library.scratch_floats(batch)

    def compute(views: range) -> None:
        scratch = np.empty(floats, dtype=np.float32)  # of this thread: ctypes releases the interpreter lock
        first, stop, memory = ctypes.c_int64(views.start), ctypes.c_int64(views.stop), scratch.ctypes.data
        library.compute_views(batch, first, stop, ctypes.c_void_p(memory))

    task = max(-(-count // (_TASKS_PER_THREAD * torch.get_num_threads())), _MIN_TASK_PIXELS // side**2, 1)
    parallel_for(compute, [range(first, min(first + task, count)) for first in range(0, count, task)])
    return out


def check(library: ctypes.CDLL) -> None:
    """Compares a library of colour.c with torch. Raises NoLibraryError if a bit differs."""
    views, side = _CHECKED
    pixels = np.random.default_rng(0).integers(0, 256, (views, side, side, 3), dtype=np.uint8)
    crops = torch.from_numpy(pixels)
    for augmentation, dtype in zip((V1, BYOL, BYOL), _DTYPES, strict=True):
        params = sample_params(0, 0, np.arange(views), augmentation)[0]
        params[:, Column.ORDER], params[::5, Column.SOLARISE] = ORDERS, 1
        ours = apply_by(library, crops, params, augmentation, dtype)
        if not torch.equal(ours, torch_ops.apply(crops, params, augmentation, dtype)):
            raise NoLibraryError("the compiled loop does not give the bits that torch does")
