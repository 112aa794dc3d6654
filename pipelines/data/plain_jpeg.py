"""Which JPEGs another decoder decodes correctly, decided from the markers alone (about 4 µs per file).

Decoders agree on plain JPEGs: 8 bits, grey or YCbCr, Huffman-coded, common chroma sampling, complete. On anything else
they differ from `decode.decode`, or from each other, so backends use `decode.decode` itself. In doubt, a file is not
plain.

h, w height and width as stored · H, W upright, after EXIF orientation
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from pipelines.data.formats.exif import orientation
from pipelines.data.headers import TAIL_BYTES

# EXIF 2.3, tag 0x0112: upright = stored, transposed, then its rows reversed, then its columns reversed.
TRANSPOSED, ROWS_REVERSED, COLUMNS_REVERSED = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)

# Markers of ITU-T T.81, table B.1. Frames: baseline, extended and progressive, all Huffman-coded. Skipped segments are
# tables (DHT, DQT), the restart interval (DRI), comments and application data (APP0 to APP15).
_FRAMES, _SCAN, _APP1, _APP14 = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1, 0xEE
_SKIPPED = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {_APP1, _APP14})
_SEGMENT = struct.Struct(">BBH")  # FF, marker, length including its own two bytes
_FRAME = struct.Struct(">BHHB")  # precision, height, width, number of components
# Ids and sampling factors of the components. Decoders interpolate other samplings differently.
_COMPONENTS = (
    (b"\1\2\3", b"\x22\x11\x11"),  # 4:2:0
    (b"\1\2\3", b"\x21\x11\x11"),  # 4:2:2
    (b"\1\2\3", b"\x11\x11\x11"),  # 4:4:4
    (b"\1", b"\x11"),  # grey
)


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """height, width in pixels as stored; orientation 1 to 8 EXIF's."""

    height: int
    width: int
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        swapped = self.orientation in TRANSPOSED
        return (self.width, self.height) if swapped else (self.height, self.width)


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The header of a plain and complete JPEG, or None for anything else. Never raises."""
    if data[:2] != b"\xff\xd8":
        return None
    position, frame, exif = 2, None, None
    while position + _SEGMENT.size <= len(data):
        prefix, marker, length = _SEGMENT.unpack_from(data, position)
        start, position = position + _SEGMENT.size, position + 2 + length
        if prefix != 0xFF or length < 2:
            return None
        if marker in _SKIPPED:
            continue
        if marker in _FRAMES:
            if frame is not None or (frame := _frame(data[start:position])) is None:
                return None
        elif marker == _APP1:
            if data.startswith(b"Exif\0\0", start):
                if exif is not None:  # split over several segments
                    return None
                exif = data[start:position]
        elif marker == _APP14:
            if data.startswith(b"Adobe", start) and data[start + 11 : start + 12] != b"\x01":
                return None  # not YCbCr, whatever the component ids
        elif marker == _SCAN:
            # Inside compressed data FF is followed by 00 or a restart marker, so this is the end of the image.
            complete = data.rfind(b"\xff\xd9", max(position, len(data) - TAIL_BYTES)) >= 0
            return PlainJpeg(*frame, _orientation(exif)) if frame is not None and complete else None
        else:
            return None
    return None


class JpegHeaders:
    """What `plain_jpeg` says about the images of an index, found once per image: later epochs only compare lengths.

    kinds    (N,) uint8: `UNKNOWN`, `OTHER`, or the orientation 1 to 8 of a plain JPEG whose size is that of the index
    lengths  (N,) int64, bytes of the image when its kind was found

    Bytes of another length are examined again. A file that changes while it keeps its length is not noticed here.
    """

    UNKNOWN, OTHER = 0, 255

    def __init__(self, sizes: np.ndarray) -> None:
        """sizes (N, 2) int32: height and width of every upright image."""
        self._sizes = sizes
        self.kinds = np.zeros(len(sizes), dtype=np.uint8)
        self.lengths = np.zeros(len(sizes), dtype=np.int64)

    def examine(self, image: int, data: bytes) -> int:
        """The kind of an image, from its bytes."""
        header = plain_jpeg(data)
        plain = header is not None and header.upright_size == tuple(self._sizes[image].tolist())
        kind = header.orientation if header is not None and plain else self.OTHER
        self.lengths[image], self.kinds[image] = len(data), kind
        return kind

    def header(self, image: int) -> PlainJpeg:
        """The header of an image whose kind is an orientation."""
        height, width = self._sizes[image].tolist()
        orientation = int(self.kinds[image])
        return PlainJpeg(*((width, height) if orientation in TRANSPOSED else (height, width)), orientation)


def stored_box(box: np.ndarray, header: PlainJpeg) -> np.ndarray:
    """(V, 4) boxes (top, left, height, width) of the upright image → the same regions of the image as stored."""
    top, left, height, width = box.T
    full_height, full_width = header.upright_size
    if header.orientation in COLUMNS_REVERSED:
        left = full_width - left - width
    if header.orientation in ROWS_REVERSED:
        top = full_height - top - height
    if header.orientation in TRANSPOSED:
        top, left, height, width = left, top, width, height
    return np.stack([top, left, height, width], axis=-1)


def _frame(segment: bytes) -> tuple[int, int] | None:
    """(height, width) from a frame header of 8 bits and common components."""
    if len(segment) < _FRAME.size:
        return None
    precision, height, width, count = _FRAME.unpack_from(segment)
    ids_and_sampling = segment[6::3], segment[7::3]
    known = ids_and_sampling in _COMPONENTS and len(segment) == _FRAME.size + 3 * count
    return (height, width) if known and precision == 8 and height and width else None


def _orientation(exif: bytes | None) -> int:
    if exif is None:
        return 1
    return orientation(exif)[0]
