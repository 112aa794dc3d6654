"""Encoded bytes → crops in compiled code without the interpreter lock: one decode and V crops per image.

V views · B images per task · H, W sides of an image · S side of a crop, all in pixels

Crop and resize use the antialiased bilinear filter of `augment.resample`, vertically and then horizontally, in float32
and rounded to nearest once: within one level of `torch.nn.functional.interpolate` on the CPU, which rounds twice. Needs
numba, a dependency of FFCV.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

JIT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
intrinsic: Any = numba_intrinsic  # for type checkers: it removes the first parameter
DONE, UNREADABLE, OTHER_SIZE, NOT_DECODED = 0, 1, 2, 3
_RGB = 0  # TJPF_RGB


@intrinsic
def call(typing_context, address, arguments):
    """`((int64_t (*)(int64_t, ...))address)(*arguments)`: addresses are arguments, so that the code can be cached."""

    def generate(context, builder, signature, values):
        parameters = cgutils.unpack_tuple(builder, values[1])
        function = ir.FunctionType(ir.IntType(64), [parameter.type for parameter in parameters])
        return builder.call(builder.inttoptr(values[0], function.as_pointer()), parameters)

    return types.int64(types.int64, arguments), generate


@intrinsic
def weighted_pixel(typing_context, pixels, weights, taps):
    """Σ_k weights[k] · pixels[k] of float32 RGB, rounded to nearest: red | green << 8 | blue << 16.

    `pixels` and `weights` are addresses. Uses vectors of four lanes, the fourth unused: one float after the last pixel
    is read too. LLVM does not vectorise three channels by itself, and this halves the time of a crop.
    """

    def generate(context, builder, signature, values):
        scalar, index = ir.FloatType(), ir.IntType(64)
        lanes = ir.VectorType(scalar, 4)
        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.5] * 4))
        pixels = builder.inttoptr(values[0], scalar.as_pointer())
        weights = builder.inttoptr(values[1], scalar.as_pointer())
        empty = ir.Constant(lanes, ir.Undefined)
        broadcast = ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
        with cgutils.for_range(builder, values[2], intp=index) as loop:
            offset = builder.mul(loop.index, index(3))
            pixel = builder.bitcast(builder.gep(pixels, [offset], source_etype=scalar), lanes.as_pointer())
            pixel = builder.load(pixel, typ=lanes, align=4)
            weight = builder.load(builder.gep(weights, [loop.index], source_etype=scalar), typ=scalar)
            weight = builder.insert_element(empty, weight, ir.IntType(32)(0))
            weight = builder.shuffle_vector(weight, empty, broadcast)
            product = builder.fmul(pixel, weight, flags=("contract",))
            builder.store(builder.fadd(builder.load(total, typ=lanes), product, flags=("contract",)), total)
        levels = builder.fptosi(builder.load(total, typ=lanes), ir.VectorType(ir.IntType(32), 4))
        narrow = builder.trunc(levels, ir.VectorType(ir.IntType(8), 4))
        return builder.zext(builder.bitcast(narrow, ir.IntType(32)), index)

    return types.int64(types.int64, types.int64, types.int64), generate


@njit(**JIT)
def crop_task(
    calls: np.ndarray,
    raw: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    sizes: np.ndarray,
    boxes: np.ndarray,
    encoded: np.ndarray,
    pixels: np.ndarray,
    out: np.ndarray,
    first: int,
    status: np.ndarray,
) -> None:
    """Read, decode and crop B images of a file, for rows `first` to `first` + B - 1 of a batch.

    calls           (5,) int64: addresses of pread, tjDecompressHeader3 and tjDecompress2, a decompressor, the file
    raw             (B,) bool, pixels rather than a JPEG
    offsets, lengths  (B,) int64, position and number of the bytes in the file
    sizes           (B, 2) int32 height and width
    boxes           (V, B, 4) int32 top, left, height, width, inside the image
    encoded, pixels  scratch, uint8, for the longest JPEG and for the largest image
    out             (V, rows, S, 3·S) uint8, filled
    status          (B,) uint8, filled: DONE, or why an image was skipped
    """
    header = np.empty(4, dtype=np.int32)  # width, height, subsampling, colour space
    for i in range(len(raw)):
        height, width = sizes[i, 0], sizes[i, 1]
        if raw[i]:  # only the rows that a box covers
            top, bottom = height, np.int64(0)
            for view in range(len(boxes)):
                top = min(top, np.int64(boxes[view, i, 0]))
                bottom = max(bottom, np.int64(boxes[view, i, 0] + boxes[view, i, 2]))
            skipped, length = 3 * width * top, 3 * width * (bottom - top)
            read = call(calls[0], (calls[4], pixels[skipped:].ctypes.data, length, offsets[i] + skipped))
            status[i] = DONE if read == length else UNREADABLE
        else:
            source, length = encoded.ctypes.data, lengths[i]
            read = call(calls[0], (calls[4], source, length, offsets[i]))
            if read != length:
                status[i] = UNREADABLE
                continue
            info = header.ctypes.data
            bad = call(calls[1], (calls[3], source, length, info, info + 4, info + 8, info + 12))
            if np.int32(bad) != 0 or header[0] != width or header[1] != height:
                status[i] = OTHER_SIZE
                continue
            bad = call(calls[2], (calls[3], source, length, pixels.ctypes.data, width, 3 * width, height, _RGB, 0))
            status[i] = DONE if np.int32(bad) == 0 else NOT_DECODED
        if status[i] == DONE:
            for view in range(len(boxes)):
                crop(pixels, height, width, boxes[view, i], out[view, first + i])


@njit(**JIT)
def crop(pixels: np.ndarray, height: int, width: int, box: np.ndarray, out: np.ndarray) -> None:
    """One crop: pixels (≥ H·W·3,) uint8 and box (4,) int32 → out (S, 3·S) uint8."""
    top, left, box_h, box_w = box
    side = len(out)
    max_taps = 2 * (max(box_h, box_w) // side + 1)
    row_first, row_weights = np.empty(side, np.int64), np.empty((side, max_taps), np.float32)
    column_first, column_weights = np.empty(side, np.int64), np.empty((side, max_taps), np.float32)
    row_taps = triangle(box_h, side, row_first, row_weights)
    column_taps = triangle(box_w, side, column_first, column_weights)
    line = np.zeros(3 * box_w + 1, np.float32)
    for y in range(side):
        start = 3 * ((top + row_first[y]) * width + left)
        _rows(pixels, start, 3 * width, row_weights[y], row_taps, line[:-1])
        _columns(line, column_first, column_weights, column_taps, out[y])


@njit(**JIT)
def triangle(length: int, side: int, first: np.ndarray, weights: np.ndarray) -> int:
    """Weights that resize `length` pixels to `side`: `resample.filter_matrix` without its zeros.

    Output o is the sum over k of weights[o, k] · pixel[first[o] + k]. Returns the number of k: the maximum over all
    outputs, at most `length`. Unused weights are 0, and their pixels are inside.
    """
    scale = length / side
    reach = max(scale, 1.0)
    taps = min(length, int(np.ceil(2 * reach)))
    for o in range(side):
        centre = (o + 0.5) * scale
        low = max(0, int(np.floor(centre - reach + 0.5)))
        low = min(low, length - taps)
        total = 0.0
        for k in range(taps):
            total += max(0.0, 1.0 - abs(low + k + 0.5 - centre) / reach)
        for k in range(taps):
            weights[o, k] = max(0.0, 1.0 - abs(low + k + 0.5 - centre) / reach) / total
        first[o] = low
    return taps


@njit(**JIT)
def _rows(pixels: np.ndarray, start: int, stride: int, weights: np.ndarray, taps: int, line: np.ndarray) -> None:
    """line = Σ_k weights[k] · (row k of the box), two rows at a time."""
    count = len(line)
    above = pixels[start : start + count]
    if taps == 1:
        for j in range(count):
            line[j] = np.float32(above[j])
        return
    below = pixels[start + stride : start + stride + count]
    w0, w1 = weights[0], weights[1]
    for j in range(count):
        line[j] = w0 * np.float32(above[j]) + w1 * np.float32(below[j])
    k = 2
    while k + 1 < taps:
        above = pixels[start + k * stride : start + k * stride + count]
        below = pixels[start + (k + 1) * stride : start + (k + 1) * stride + count]
        w0, w1 = weights[k], weights[k + 1]
        for j in range(count):
            line[j] += w0 * np.float32(above[j]) + w1 * np.float32(below[j])
        k += 2
    if k < taps and weights[k] != 0:
        above = pixels[start + k * stride : start + k * stride + count]
        w0 = weights[k]
        for j in range(count):
            line[j] += w0 * np.float32(above[j])


@njit(**JIT)
def _columns(line: np.ndarray, first: np.ndarray, weights: np.ndarray, taps: int, out: np.ndarray) -> None:
    """Every output pixel of one row, rounded. Weights sum to 1, so values stay in 0 to 255."""
    pixels, table, row = line.ctypes.data, weights.ctypes.data, 4 * weights.shape[1]
    for x in range(len(first)):
        if taps == 2:  # enlarged; a loop of constant length saves a third of the crop's time
            rgb = weighted_pixel(pixels + 12 * first[x], table + row * x, 2)
        else:
            rgb = weighted_pixel(pixels + 12 * first[x], table + row * x, taps)
        out[3 * x] = np.uint8(rgb)
        out[3 * x + 1] = np.uint8(rgb >> 8)
        out[3 * x + 2] = np.uint8(rgb >> 16)
