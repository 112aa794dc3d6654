"""Writes TIFFs of any layout with tags as given, without a library: what a reader must not guess."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np


def _packbits(data: bytes) -> bytes:
    """PackBits (TIFF 6.0, section 9) of literal runs."""
    return b"".join(bytes([len(part) - 1]) + part for part in (data[i : i + 128] for i in range(0, len(data), 128)))


def _lzw(data: bytes) -> bytes:
    """TIFF's LZW with codes of 9 bits: the table is cleared before it needs more."""
    codes = []
    for i in range(0, len(data), 250):
        codes += [256, *data[i : i + 250]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    return bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))


COMPRESSIONS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (1, bytes),
    "lzw": (5, _lzw),
    "deflate": (8, zlib.compress),
    "old deflate": (32946, zlib.compress),
    "packbits": (32773, _packbits),
    "lzma": (34925, lzma.compress),
}


def rows_of(samples: np.ndarray, bits: int, order: str) -> list[bytes]:
    """Each row (w, c) of (h, w, c) samples as bytes of the file."""
    if bits % 8 == 0:
        return [row.astype(row.dtype.newbyteorder(order)).tobytes() for row in samples]
    rows = []
    for row in samples.reshape(len(samples), -1):
        text = "".join(f"{int(value):0{bits}b}" for value in row)
        rows.append(bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)))
    return rows


def tiff(
    samples: np.ndarray,
    photometric: int,
    *,
    bits: int | None = None,
    planar: bool = False,
    compression: str = "none",
    order: str = "<",
    rows_per_strip: int | None = None,
    tile: tuple[int, int] | None = None,
    predictor: int = 1,
    reversed_bits: bool = False,
    big: bool = False,
    tags: dict[int, tuple[int, Any]] | None = None,
) -> bytes:
    """The bytes of a TIFF of (h, w, c) samples. `tags`: further ones, {number: (type, values)}, which win."""
    height, width, count = samples.shape
    bits = bits or 8 * samples.itemsize
    number, compress = COMPRESSIONS[compression]
    planes = [samples[..., i : i + 1] for i in range(count)] if planar else [samples]
    segments = []
    for plane in planes:
        for part in _cut(plane, rows_per_strip or height, tile):
            if predictor == 2:
                part = _differences(part)
            rows = _floating_point(part) if predictor == 3 else rows_of(part, bits, order)
            data = compress(b"".join(rows))
            segments.append(bytes(int(f"{byte:08b}"[::-1], 2) for byte in data) if reversed_bits else data)
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[samples.dtype.kind]
    entries: dict[int, tuple[int, Any]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * count),
        259: (3, [number]),
        262: (3, [photometric]),
        277: (3, [count]),
        284: (3, [2 if planar else 1]),
        339: (3, [kind] * count),
    }
    if predictor != 1:
        entries[317] = (3, [predictor])
    if reversed_bits:
        entries[266] = (3, [2])
    if tile is None:
        entries |= {278: (4, [rows_per_strip or height]), 279: (4, [len(s) for s in segments]), 273: (4, None)}
    else:
        entries |= {322: (4, [tile[1]]), 323: (4, [tile[0]]), 325: (4, [len(s) for s in segments]), 324: (4, None)}
    return assemble(entries | (tags or {}), segments, order, big)


def assemble(entries: dict[int, tuple[int, Any]], segments: list[bytes], order: str, big: bool = False) -> bytes:
    """A TIFF of these tags and strips; a tag without values gets the offsets of the strips."""
    start = 16 if big else 8
    offsets = [start + sum(map(len, segments[:i])) for i in range(len(segments))]
    body = b"".join(segments)
    body += bytes(-len(body) % 8)
    at = start + len(body)
    inline, head, entry = (8, "Q", "HHQ") if big else (4, "H", "HHI")
    more_at = at + struct.calcsize("=" + head) + len(entries) * (4 + 2 * inline) + inline
    directory, more = struct.pack(order + head, len(entries)), b""
    for tag in sorted(entries):
        kind, values = entries[tag]
        values = offsets if values is None else values
        code = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 7: "B", 11: "f", 12: "d", 16: "Q"}[kind]
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        directory += struct.pack(order + entry, tag, kind, len(values) // (2 if kind == 5 else 1))
        if len(packed) > inline:
            directory += struct.pack(order + ("Q" if big else "I"), more_at + len(more))
            more += packed + bytes(-len(packed) % 8)
        else:
            directory += packed.ljust(inline, b"\0")
    mark = b"II" if order == "<" else b"MM"
    header = mark + (struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at))
    return header + body + directory + bytes(inline) + more


def _cut(plane: np.ndarray, rows: int, tile: tuple[int, int] | None) -> list[np.ndarray]:
    if tile is None:
        return [plane[y : y + rows] for y in range(0, len(plane), rows)]
    height, width = (-(-side // t) * t for side, t in zip(plane.shape[:2], tile, strict=True))
    full = np.zeros((height, width, plane.shape[2]), plane.dtype)
    full[: plane.shape[0], : plane.shape[1]] = plane
    return [full[y : y + tile[0], x : x + tile[1]] for y in range(0, height, tile[0]) for x in range(0, width, tile[1])]


def _differences(part: np.ndarray) -> np.ndarray:
    integers = part.view(f"u{part.itemsize}")
    out = integers.copy()
    out[:, 1:] -= integers[:, :-1]
    return out.view(part.dtype)


def _floating_point(part: np.ndarray) -> list[bytes]:
    """Adobe's predictor 3: the bytes of a row by significance, then their differences."""
    rows, count = [], part.shape[2]
    for row in part:
        planes = np.frombuffer(row.astype(row.dtype.newbyteorder(">")).tobytes(), np.uint8).reshape(-1, part.itemsize)
        line = planes.T.reshape(-1, count).copy()
        line[1:] -= line[:-1].copy()
        rows.append(line.tobytes())
    return rows
