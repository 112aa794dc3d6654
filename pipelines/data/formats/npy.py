"""NumPy arrays (.npy) as images: (H, W), (H, W, C) or (C, H, W) of bytes, integers or floats.

Which axis holds the channels follows from their number: it is the last, or else the first, that has as many entries as
were asked for. Whole is a file that holds all values of the array. Nothing in it is executed: arrays of objects are
refused.

H, W height and width · C channels
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.lib import format as npy

from pipelines.data.formats.bands import BandsError
from pipelines.data.formats.common import Picture, check_size
from pipelines.data.formats.deep import Deep
from pipelines.data.formats.unsupported import UnsupportedError

MAGIC = b"\x93NUMPY"
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MOST_CHANNELS = 4096  # of an array whose channels are not as many as were asked for, to tell them from a side


def decode(data: bytes, channels: int) -> Picture:
    """The array as an image of `channels` bands; grey and RGB also where others are asked for, as from other formats.

    Raises BandsError for another number of bands, and ValueError for data that is cut off or no image.
    """
    shape, fortran, dtype, start = read_header(data)
    layout = _layout(shape, channels)
    count = math.prod(shape)
    if len(data) - start < count * dtype.itemsize:
        raise ValueError(f"the array is truncated: it has {len(data) - start:,} of {count * dtype.itemsize:,} bytes")
    values = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran else "C")
    values = values[..., None] if layout == "HW" else values.transpose(1, 2, 0) if layout == "CHW" else values
    values = values.astype(dtype.newbyteorder("="), copy=False)
    kind = f"NPY {layout};{dtype.name}"
    if dtype.kind == "b":
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return Picture(np.repeat(values, 3, axis=2) if channels == 3 and values.shape[2] == 1 else values, kind)
    white = 65_535 if values.dtype == np.uint16 else None
    return Picture(Deep(values[..., 0] if values.shape[2] == 1 else values, white), kind)


def read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran's order, type, position of the first value). Raises ValueError."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        reader = _READERS.get(version)
        shape, fortran, dtype = reader(file) if reader is not None else ((), False, np.dtype(object))
    except ValueError as error:
        raise ValueError(f"it is a NumPy array whose header is truncated or damaged ({error})") from error
    if reader is None:
        raise UnsupportedError(f"it is a NumPy array in version {version} of the format: save it again with np.save")
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise UnsupportedError(f"it is an array of {dtype.name}: save it as uint8, uint16 or float32")
    return shape, fortran, dtype, file.tell()


def size(shape: tuple[int, ...], channels: int) -> tuple[int, int]:
    """(H, W) of an array of this shape. Raises as `decode`."""
    layout = _layout(shape, channels)
    return (shape[1], shape[2]) if layout == "CHW" else (shape[0], shape[1])


def _layout(shape: tuple[int, ...], channels: int) -> str:
    """HW, HWC or CHW."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise UnsupportedError(
            f"it is an array of shape {shape}; expected (height, width), (height, width, channels) or (channels, "
            "height, width): save each image as an array of its own"
        )
    if len(shape) == 2:
        layout, bands = "HW", 1
    else:
        allowed = (channels, 1, 3) if channels in (1, 3) else (channels,)
        matches = [(name, bands) for wanted in allowed for name, bands in _axes(shape) if bands == wanted]
        layout, bands = matches[0] if matches else min(_axes(shape), key=lambda axis: axis[1])
        if bands > _MOST_CHANNELS:
            raise UnsupportedError(f"it is an array of shape {shape}, in which no axis is one of channels")
    first = 1 if layout == "CHW" else 0
    check_size(shape[first + 1], shape[first])
    if bands != channels and not (channels in (1, 3) and bands in (1, 3)):
        raise BandsError(bands, channels)
    return layout


def _axes(shape: tuple[int, ...]) -> tuple[tuple[str, int], tuple[str, int]]:
    """The two axes that may be that of the channels, the usual one first, with their lengths."""
    return ("HWC", shape[2]), ("CHW", shape[0])
