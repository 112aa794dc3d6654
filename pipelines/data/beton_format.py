"""FFCV's `.beton` format, version 2, as fastmoco writes and reads it: one file of images and tables of their offsets.

    header │ field table │ sample table │ 0…0 │ page │ page │ … │ allocation table        (little-endian)

    header        version, number of fields, bytes per page, N, offset of the allocation table
    field table   two fields: `image` (kind 2) and `label` (kind 1)
    sample table  N × (mode, width, height, offset of the bytes, label)
    pages         encoded images (mode 0) or H·W·3 bytes of RGB (mode 1); none crosses the end of a page
    allocations   N × (sample, offset of its bytes, their number), up to the end of the file

FFCV itself can read such a file.

N images · H, W height and width in pixels
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import IO

import numpy as np

from pipelines.data.formats.common import MAX_PIXELS
from pipelines.errors import DataError

VERSION = 2
JPG, RAW = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_bytes", "<u4"), ("samples", "<u8"), ("allocations_at", "<u8")]
)
FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
SAMPLE = np.dtype(  # FFCV aligns the label to 8 bytes and leaves the image's 13 unaligned
    {
        "names": ["mode", "width", "height", "pointer", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("length", "<u8")])
SAMPLES_AT = HEADER.itemsize + 2 * FIELD.itemsize
NO_LABEL = -1

REMEDY = "copy it again, or convert again with tools/make_ffcv.py"


def field_table() -> np.ndarray:
    """The two fields of every file, an image and an integer, both without arguments."""
    table = np.zeros(2, dtype=FIELD)
    table["kind"], table["name"] = (2, 1), (b"image", b"label")
    return table


@dataclass(frozen=True)
class Tables:
    """The tables of a file, checked for consistency.

    samples, lengths  (N,) of SAMPLE, and (N,) int64 bytes of every image
    sha256            of all tables
    """

    samples: np.ndarray
    lengths: np.ndarray
    sha256: str


def read_tables(file: IO[bytes], shown: str) -> Tables:
    """The tables of an open file, called `shown` in messages. Sizes are checked before anything is allocated.

    Raises DataError with the value for any that is impossible.
    """

    def bad(reason: str) -> DataError:
        return DataError(f"{shown} is not a usable .beton file: {reason}; {REMEDY}")

    length = os.fstat(file.fileno()).st_size
    if length < SAMPLES_AT:
        raise bad(f"{length:,} bytes are less than its header")
    file.seek(0)
    front = file.read(SAMPLES_AT)
    version, field_count, page_bytes, count, allocations_at = (
        int(value) for value in np.frombuffer(front, HEADER, 1)[0].item()
    )
    if version != VERSION:
        raise bad(f"its version is {version}, expected {VERSION}")
    if field_count != 2 or front[HEADER.itemsize :] != field_table().tobytes():
        raise bad("its fields are not an image and an integer label")
    if page_bytes == 0 or page_bytes & (page_bytes - 1):
        raise bad(f"its pages have {page_bytes:,} bytes, expected a power of two")
    samples_end = SAMPLES_AT + count * SAMPLE.itemsize
    if count == 0 or samples_end > allocations_at or allocations_at + count * ALLOCATION.itemsize != length:
        raise bad(f"its header claims {count:,} images, whose tables do not fit its {length:,} bytes")
    rows = file.read(count * SAMPLE.itemsize)
    file.seek(allocations_at)
    tail = file.read(count * ALLOCATION.itemsize)
    if len(rows) + len(tail) != count * (SAMPLE.itemsize + ALLOCATION.itemsize):
        raise bad("it became shorter while it was read")
    samples, allocations = np.frombuffer(rows, SAMPLE), np.frombuffer(tail, ALLOCATION)

    if (allocations["sample"] != np.arange(count, dtype=np.uint64)).any():
        raise bad("its allocation table does not have one row per image, in order")
    if (allocations["pointer"] != samples["pointer"]).any():
        raise bad("its two tables disagree on where the images begin")
    start, size = allocations["pointer"], allocations["length"]
    outside = (start < samples_end) | (start > allocations_at) | (size == 0) | (size > page_bytes)
    outside |= start + np.minimum(size, page_bytes) > allocations_at  # the minimum keeps the sum below 2⁶⁴
    if outside.any():
        raise bad(f"image {int(outside.argmax())} is not inside its pages")
    area = samples["width"].astype(np.uint64) * samples["height"]
    wrong = (area == 0) | (area > MAX_PIXELS) | (samples["mode"] > RAW)
    wrong |= (samples["mode"] == RAW) & (size != 3 * area)
    if wrong.any():
        i = int(wrong.argmax())
        row = samples[i]
        raise bad(f"image {i} claims {row['width']}×{row['height']} pixels in {size[i]:,} bytes of mode {row['mode']}")
    return Tables(samples, size.astype(np.int64), hashlib.sha256(front + rows + tail).hexdigest())
