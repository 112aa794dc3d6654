"""The first directory of a TIFF (TIFF 6.0, section 2; BigTIFF), and TIFFs with another directory for the same data."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES = 317, 320, 322, 323, 324, 325
NEW_SUBFILE, SUB_IFDS, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, DNG_VERSION = 254, 330, 332, 338, 339, 50706
_T4_OPTIONS, _T6_OPTIONS, _JPEG_TABLES, _SUBSAMPLING, _POSITIONING = 292, 293, 347, 530, 531
_OLD_JPEG, _COEFFICIENTS, _REFERENCE = tuple(range(512, 522)), 529, 532

# Those that decoding needs. Others are metadata, and may be damaged.
_READ = frozenset(
    {WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP}
    | {STRIP_BYTES, PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES, NEW_SUBFILE}
    | {SUB_IFDS, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, DNG_VERSION, _T4_OPTIONS, _T6_OPTIONS, _JPEG_TABLES}
    | {_SUBSAMPLING, _POSITIONING, _COEFFICIENTS, _REFERENCE, *_OLD_JPEG}
)
# Codes of struct for the types of values: BYTE, ASCII, SHORT, LONG, RATIONAL, … of TIFF and BigTIFF.
_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
_TYPES |= {13: "I", 16: "Q", 17: "q", 18: "Q"}
_MAX_VALUES = 10_000_000  # of one tag: there are two for every strip or tile


@dataclass(frozen=True, slots=True)
class TiffTags:
    """The first directory.

    order   "<" or ">", the byte order
    values  of the tags that decoding needs, by number
    types   of those, by number
    """

    order: str
    values: dict[int, tuple]
    types: dict[int, int]

    def one(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        values = self.values.get(tag)
        return int(values[0]) if values else default


def read_tags(data: bytes) -> TiffTags:
    """The tags of the first image. Raises ValueError with what is wrong."""
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        if big:
            (at,) = struct.unpack_from(order + "Q", data, 8)
            (count,) = struct.unpack_from(order + "Q", data, at)
        else:
            (at,) = struct.unpack_from(order + "I", data, 4)
            (count,) = struct.unpack_from(order + "H", data, at)
    except (struct.error, OverflowError) as error:
        raise ValueError("it is a truncated or damaged TIFF: its directory is not in the file") from error
    entry, inline, first = ("HHQ", 8, at + 8) if big else ("HHI", 4, at + 2)
    step = 4 + 2 * inline
    if first + step * count > len(data):
        raise ValueError("it is a truncated or damaged TIFF: its directory is not in the file")
    values, types = {}, {}
    for position in range(first, first + step * count, step):
        tag, kind, number = struct.unpack_from(order + entry, data, position)
        if tag not in _READ or tag in values:
            continue
        code = _TYPES.get(kind)
        size = number * struct.calcsize("=" + code) if code else 0
        start = position + 4 + inline
        if size > inline:
            (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, start)
        if not code or not number or number > _MAX_VALUES or start + size > len(data):
            raise ValueError(f"it is a truncated or damaged TIFF: the values of its tag {tag} are not in the file")
        types[tag] = kind
        values[tag] = struct.unpack_from(
            order + code * number if len(code) > 1 else f"{order}{number}{code}", data, start
        )
    return TiffTags(order, values, types)


def with_tags(data: bytes, tags: TiffTags, changed: dict[int, tuple[int, ...]]) -> bytes:
    """A TIFF of the same data whose only directory has these tags, and `changed` ones as LONG.

    Offsets keep their meaning, since the new directory stands at the end.
    """
    entries: dict[int, tuple[int, tuple]] = {
        tag: (tags.types[tag], values)
        for tag, values in tags.values.items()
        if tag not in (ORIENTATION, SUB_IFDS, NEW_SUBFILE, DNG_VERSION)
    }
    entries |= {tag: (4, values) for tag, values in changed.items()}
    order, content, padded = tags.order, [], len(data) + len(data) % 2
    more_at, more = padded + 2 + 12 * len(entries) + 4, b""
    for tag in sorted(entries):
        kind, values = entries[tag]
        if kind in (16, 17, 18):  # of BigTIFF
            kind = 4
        code = _TYPES[kind]
        packed = struct.pack(order + code * (len(values) // len(code)), *values)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(order + "I", more_at + len(more))
            more += packed + bytes(len(packed) % 2)
        content.append(struct.pack(order + "HHI", tag, kind, len(values) // len(code)) + field)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", padded)
    directory = struct.pack(order + "H", len(entries)) + b"".join(content) + bytes(4) + more
    return header + data[8:] + bytes(len(data) % 2) + directory
