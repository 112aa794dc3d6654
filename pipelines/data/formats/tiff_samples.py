"""The samples of a TIFF, from its strips or tiles, whatever their number, bits, byte order and planes.

libtiff decompresses: it is given the same data as an image of bytes, one row of bytes a row of samples. Predictors and
everything about samples are undone here.

h, w height and width as stored · c samples of a pixel in a plane
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipelines.data.formats import tiff_tags as t
from pipelines.data.formats.common import MAX_PIXELS, open_image
from pipelines.data.formats.unsupported import UnsupportedError

NONE = 1
PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, Deflate (both numbers), LZMA, ZSTD
CODECS = (NONE, 32773, *PREDICTED)  # and PackBits: compressions of bytes, whatever these mean
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_MAX_BYTES = 8 * MAX_PIXELS
_DIFFERENCES, _FLOATING_POINT = 2, 3  # predictors


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the samples of an image, or of one of its planes, are stored.

    samples           of a pixel
    bits, format      of a sample; 1 unsigned, 2 signed, 3 float
    planar            whether each sample has strips or tiles of its own
    tile              (height, width), or None for strips
    offsets, lengths  of the strips or tiles, in bytes
    reversed_bits     whether the first bit of a byte is its lowest
    """

    width: int
    height: int
    samples: int
    bits: int
    format: int
    compression: int
    predictor: int
    planar: bool
    tile: tuple[int, int] | None
    rows_per_strip: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    order: str
    reversed_bits: bool

    @property
    def segments(self) -> tuple[int, int]:
        """Strips or tiles of a plane: (down, across)."""
        if self.tile is None:
            return -(-self.height // self.rows_per_strip), 1
        return -(-self.height // self.tile[0]), -(-self.width // self.tile[1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of samples in one segment."""
        width = self.width if self.tile is None else self.tile[1]
        return -(-width * (1 if self.planar else self.samples) * self.bits // 8)

    @property
    def rows(self) -> int:
        """Rows of a plane with those that the last tiles have in excess."""
        return self.height if self.tile is None else self.segments[0] * self.tile[0]

    @property
    def can_be_predicted(self) -> bool:
        """Whether the predictor is one for such values."""
        return self.bits in (8, 16, 32, 64) and (self.predictor != _FLOATING_POINT or self.format == _FLOAT)

    def check(self) -> None:
        """Raises ValueError for a layout that contradicts itself, or with numbers that are not supported."""
        fine = {_UNSIGNED: (*range(1, 17), 32, 64), _SIGNED: (8, 16, 32, 64), _FLOAT: (16, 32, 64)}
        if self.bits not in fine.get(self.format, ()):
            kinds = {_SIGNED: " signed", _FLOAT: " float", 5: " complex integer", 6: " complex"}
            raise UnsupportedError(f"it is a TIFF of {self.bits}-bit{kinds.get(self.format, '')} values, not supported")
        if self.predictor not in (1, _DIFFERENCES, _FLOATING_POINT) or not 0 < self.samples < 65_536:
            raise ValueError("it is a TIFF whose tags contradict each other")
        if self.rows_per_strip < 1 or (self.tile is not None and min(self.tile) < 1):
            raise ValueError("it is a TIFF whose tags contradict each other: a strip or tile has no size")
        down, across = self.segments
        count = down * across * (self.samples if self.planar else 1)
        if len(self.offsets) != count or (len(self.lengths) != count and self.compression != NONE):
            raise ValueError(
                f"it is a truncated or damaged TIFF: it lists {len(self.offsets):,} strips or tiles, and has {count:,}"
            )
        if self.rows * across * self.row_bytes * (self.samples if self.planar else 1) > _MAX_BYTES:
            raise ValueError(f"its header claims more than {_MAX_BYTES:,} bytes of pixels, the limit")

    def planes(self) -> list[Layout]:
        """The layout of each sample of a planar image; the whole of any other."""
        if not self.planar:
            return [self]
        down, across = self.segments
        count = down * across
        return [
            replace(
                self,
                planar=False,
                samples=1,
                offsets=self.offsets[i * count : (i + 1) * count],
                lengths=self.lengths[i * count : (i + 1) * count],
            )
            for i in range(self.samples)
        ]

    def tags(self) -> dict[int, tuple[int, ...]]:
        """The tags that say where the samples of this plane are."""
        tiled = self.tile is not None
        offsets, lengths = (t.TILE_OFFSETS, t.TILE_BYTES) if tiled else (t.STRIP_OFFSETS, t.STRIP_BYTES)
        return {t.SAMPLES: (self.samples,), offsets: self.offsets, lengths: self.lengths}

    def segment_bytes(self, i: int) -> int:
        """Bytes of strip or tile i of a plane, decompressed."""
        down, _ = self.segments
        rows = self.tile[0] if self.tile is not None else self.rows_per_strip
        if self.tile is None and i == down - 1:
            rows = self.height - i * self.rows_per_strip
        return rows * self.row_bytes


def cut_segments(layout: Layout, length: int) -> int:
    """Number of strips or tiles that are not, or not completely, in a file of `length` bytes."""
    cut = 0
    for plane in layout.planes():
        sizes = (
            [plane.segment_bytes(i) for i in range(len(plane.offsets))] if plane.compression == NONE else plane.lengths
        )
        ends = zip(plane.offsets, sizes, strict=True)
        cut += sum(1 for offset, size in ends if offset + size > length or not size)
    return cut


def read_samples(data: bytes, tags: t.TiffTags, layout: Layout, *, accept: bool) -> np.ndarray:
    """(h, w, samples): unsigned, signed or float. `accept`: zeros for strips or tiles that are cut off.

    Raises ValueError or Pillow's OSError for data that does not decompress to all samples.
    """
    if layout.predictor != 1 and layout.compression in PREDICTED and not layout.can_be_predicted:
        raise UnsupportedError(
            f"it is a TIFF with predictor {layout.predictor} for {layout.bits}-bit values, not supported"
        )
    planes = [_plane(data, tags, plane, accept) for plane in layout.planes()]
    return np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0]


def _plane(data: bytes, tags: t.TiffTags, plane: Layout, accept: bool) -> np.ndarray:
    """(h, w, c) of one plane."""
    if plane.compression == NONE:
        rows = _stored(data, plane, accept)
    elif accept:
        rows = _whole_segments(data, tags, plane)
    else:
        rows = _decompressed(data, tags, plane)
    _, across = plane.segments
    width = plane.width if plane.tile is None else plane.tile[1]
    rows = rows.reshape(plane.rows * across, plane.row_bytes)  # one row of one segment each
    values = _values(rows, plane, width)
    return values.reshape(plane.rows, across * width, plane.samples)[: plane.height, : plane.width]


def _stored(data: bytes, plane: Layout, accept: bool) -> np.ndarray:
    """(rows, across · row bytes) uint8 of uncompressed segments."""
    segments = []
    for i, offset in enumerate(plane.offsets):
        part = data[offset : offset + plane.segment_bytes(i)]
        segments.append(part.ljust(plane.segment_bytes(i), b"\0") if accept else part)
    rows = np.frombuffer(b"".join(segments), dtype=np.uint8)
    if plane.reversed_bits:
        rows = np.packbits(np.unpackbits(rows, bitorder="little"))
    return _side_by_side(rows, plane)


def _side_by_side(segments: np.ndarray, plane: Layout) -> np.ndarray:
    """Bytes of whole segments, one after another → (rows, across · row bytes)."""
    if plane.tile is None:
        return segments.reshape(plane.rows, plane.row_bytes)
    down, across = plane.segments
    tiles = segments.reshape(down, across, plane.tile[0], plane.row_bytes)
    return tiles.transpose(0, 2, 1, 3).reshape(plane.rows, across * plane.row_bytes)


def _decompressed(data: bytes, tags: t.TiffTags, plane: Layout) -> np.ndarray:
    """(rows, across · row bytes) uint8, by libtiff: an image of bytes, in the same strips or tiles."""
    _, across = plane.segments
    changed = {t.WIDTH: (across * plane.row_bytes,), t.LENGTH: (plane.rows,), t.BITS: (8,), t.PHOTOMETRIC: (1,)}
    changed |= {t.COMPRESSION: (plane.compression,), t.PLANAR: (1,), **plane.tags(), t.SAMPLES: (1,)}
    kept = {t.FILL_ORDER: tags.values[t.FILL_ORDER]} if t.FILL_ORDER in tags.values else {}
    if plane.tile is None:
        changed[t.ROWS_PER_STRIP] = (plane.rows_per_strip,)
    else:
        changed |= {t.TILE_LENGTH: (plane.tile[0],), t.TILE_WIDTH: (plane.row_bytes,)}
    with open_image(t.with_tags(data, t.TiffTags(tags.order, kept, tags.types), changed), ("TIFF",)) as image:
        return np.asarray(image)


def _whole_segments(data: bytes, tags: t.TiffTags, plane: Layout) -> np.ndarray:
    """`_decompressed` of the segments that are in the file, one by one; zeros for the others."""
    segments = []
    for i, (offset, length) in enumerate(zip(plane.offsets, plane.lengths, strict=True)):
        size, part = plane.segment_bytes(i), None
        if length and offset + length <= len(data):
            alone = replace(
                plane,
                width=8 * plane.row_bytes,
                samples=1,
                bits=1,
                height=size // plane.row_bytes,
                tile=None,
                rows_per_strip=size // plane.row_bytes,
                offsets=(offset,),
                lengths=(length,),
            )
            part = _decompressed(data, tags, alone).tobytes()
        segments.append(part or bytes(size))
    return _side_by_side(np.frombuffer(b"".join(segments), dtype=np.uint8), plane)


def _values(rows: np.ndarray, plane: Layout, width: int) -> np.ndarray:
    """(n, row bytes) uint8 → (n, w, c) values in this machine's byte order, predictors undone."""
    count, predicted = width * plane.samples, plane.compression in PREDICTED
    if predicted and plane.predictor == _FLOATING_POINT:
        size = plane.bits // 8
        summed = rows.reshape(len(rows), size * width, plane.samples).cumsum(axis=1, dtype=np.uint8)
        planes = summed.reshape(len(rows), size, count).transpose(0, 2, 1)  # from the most significant byte
        values = np.ascontiguousarray(planes).view(f">f{size}")
        return values.astype(f"f{size}").reshape(len(rows), width, plane.samples)
    if plane.bits < 8 or plane.bits in range(9, 16):
        values = _unpacked(rows, plane.bits, count)
    else:
        code = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}[plane.format]
        size = plane.bits // 8
        values = np.ascontiguousarray(rows).view(f"{plane.order}{code}{size}").astype(f"{code}{size}", copy=False)
    values = values.reshape(len(rows), width, plane.samples)
    if predicted and plane.predictor == _DIFFERENCES:
        integers = values.view(f"u{plane.bits // 8}")
        values = integers.cumsum(axis=1, dtype=integers.dtype).view(values.dtype)
    return values


def _unpacked(rows: np.ndarray, bits: int, count: int) -> np.ndarray:
    """(n, row bytes) uint8 → (n, count) values of `bits` bits, the highest bit of a byte first."""
    kind = np.uint8 if bits <= 8 else np.uint16
    values, block = np.zeros((len(rows), count), dtype=kind), max(1, 2**20 // max(1, count))
    for first in range(0, len(rows), block):
        ones = np.unpackbits(rows[first : first + block], axis=1)[:, : count * bits].reshape(-1, count, bits)
        for bit in range(bits):
            values[first : first + block] |= ones[..., bit].astype(kind) << (bits - 1 - bit)
    return values
