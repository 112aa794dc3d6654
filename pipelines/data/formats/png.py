"""PNG, decoded by Pillow from the chunks that make pixels.

Whole is a PNG whose header, palette and image data have the right checksums and hold every row. What its other chunks
hold, and whether an end chunk follows, does not matter.

h, w height and width as stored
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ImageFile

from pipelines.data.formats.common import TRUNCATED, Picture, check_size, join, open_image, rgb
from pipelines.data.formats.deep import Deep
from pipelines.data.formats.exif import orientation
from pipelines.data.formats.unsupported import UnsupportedError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"IEND\xaeB`\x82"  # the last chunk with its checksum
NO_END = "a PNG without end chunk"

_HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlacing
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, grey and alpha, RGBA
_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_ESSENTIAL = re.compile(rb"PLTE|IDAT|IEND")
_EMPTY_END = b"\0\0\0\0" + END


@dataclass(frozen=True, slots=True)
class PngChunks:
    """The chunks of a PNG, as positions in its bytes.

    header, palette, image  (first, end) of those chunks with their lengths and checksums
    orientation             of an EXIF chunk before the image data
    cut                     whether the last chunk of image data is incomplete
    resumed                 whether chunks were searched after a damaged one
    faults                  what was wrong with other chunks
    """

    width: int
    height: int
    bits: int
    colour: int
    interlaced: int
    header: tuple[int, int]
    palette: tuple[int, int] | None
    image: tuple[tuple[int, int], ...]
    orientation: int
    cut: bool
    resumed: bool
    faults: tuple[str, ...]


def read_chunks(data: bytes, *, header_only: bool = False) -> PngChunks:
    """The chunks of a PNG; with `header_only` up to the beginning of its image data.

    Raises ValueError for a wrong checksum of a chunk that makes pixels, or for a header that is not valid.
    """
    values, header, palette, image, turned, faults = None, (0, 0), None, [], 1, []
    at, cut, resumed, ended = len(SIGNATURE), False, False, False
    while at + 12 <= len(data) or (image == [] and at + 8 <= len(data)):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 12 + length
        if kind == b"IDAT" and header_only:
            image.append((at, end))
            break
        if end > len(data) or not kind.isalpha():
            if kind == b"IDAT" and (cut := bool(image) or palette is not None or values is not None):
                image.append((at, len(data)))
                break
            found = -1 if image else _next_essential(data, at + 1)
            if found < 0:
                break
            faults.append("a damaged PNG chunk")
            at, resumed = found, True
            continue
        right = int.from_bytes(data[end - 4 : end]) == zlib.crc32(data[at + 4 : end - 4])
        if kind in (b"IHDR", b"PLTE", b"IDAT"):
            if not right:
                raise ValueError(f"the checksum of its {kind.decode()} chunk is wrong")
            if kind == b"IHDR":
                header, values = (at, end), _header(data[at + 8 : end - 4])
            elif kind == b"PLTE":
                palette = (at, end)
            else:
                image.append((at, end))
        elif kind == b"IEND":
            ended = True
            break
        elif kind == b"CgBI":
            raise UnsupportedError(
                "it is Apple's variant of PNG (CgBI): convert it with `pngcrush -revert-iphone-optimizations`"
            )
        elif not right and not _is_chunk(data, end) and not image:  # its length may be what is wrong
            if (found := _next_essential(data, at + 8)) < 0:
                break
            faults.append("a damaged PNG chunk")
            at, resumed = found, True
            continue
        elif not right:
            faults.append(f"a PNG {kind.decode()} chunk with a wrong checksum")
        elif kind[0] < 97:  # upper case: decoders must know it
            raise ValueError(f"it has the unknown PNG chunk {kind.decode()}, which decoders must know")
        elif kind == b"eXIf" and not image:
            turned, fault = orientation(data[at + 8 : end - 4])
            faults += [fault] if fault else []
        at = end
    if values is None:
        raise ValueError("the PNG data is truncated or damaged: it has no header")
    if not ended and not cut and not header_only:
        faults.append(NO_END)
    return PngChunks(*values, header, palette, tuple(image), turned, cut, resumed, tuple(faults))


def _is_chunk(data: bytes, at: int) -> bool:
    """Whether a chunk seems to begin at `at`."""
    return data[at + 4 : at + 8].isalpha() and at + 12 + int.from_bytes(data[at : at + 4]) <= len(data)


def _next_essential(data: bytes, start: int) -> int:
    """Position of the next chunk from `start` that makes pixels, with the right checksum; -1 if there is none."""
    for found in _ESSENTIAL.finditer(data, start):
        at = found.start() - 4
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if end <= len(data) and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end]):
            return at
    return -1


def _header(content: bytes) -> tuple[int, int, int, int, int]:
    if len(content) != _HEADER.size:
        raise ValueError("its PNG header is not valid")
    width, height, bits, colour, compression, filtering, interlaced = _HEADER.unpack(content)
    if colour not in _CHANNELS or bits not in (1, 2, 4, 8, 16) or compression or filtering or interlaced > 1:
        raise ValueError("its PNG header is not valid")
    check_size(width, height)
    return width, height, bits, colour, interlaced


def decode(data: bytes, accept: bool, deep: bool) -> Picture:
    """The pixels of a PNG. `accept`: with missing rows too, as zeros. `deep`: colour of 16 bits with its low bytes."""
    chunks = read_chunks(data)
    faults = [*chunks.faults]
    if not chunks.image or (chunks.cut and not accept):
        raise ValueError("the PNG data is truncated")
    if chunks.resumed:
        _check_stream(data, chunks)
    pixels = None
    if not chunks.cut:
        try:
            pixels = _pixels(_clean(data, chunks), chunks, deep)
        except OSError as error:
            if not accept or "truncated" not in str(error):
                raise
    if pixels is None:
        faults = [fault for fault in faults if fault != NO_END] + [TRUNCATED]
        pixels = _pixels(_padded(data, chunks), chunks, deep)
    mode = "1" if (chunks.bits, chunks.colour) == (1, 0) else _MODES[chunks.colour]
    kind = f"PNG {mode}{';16' if chunks.bits == 16 else ''}"
    return Picture(pixels, kind, chunks.orientation, join(faults))


def _pixels(clean: bytes, chunks: PngChunks, deep: bool) -> np.ndarray | Deep:
    """(h, w, 3) uint8, or with `deep` the values of 16 bits; of grey those in any case."""
    if chunks.bits < 16 or chunks.colour == 0 or not deep:
        return _by_pillow(clean, chunks)
    if chunks.colour == 4:  # the same bytes a pixel as RGBA of 8 bits: high and low grey, high and low alpha
        header = clean[12:24] + bytes([8, 6]) + clean[26:29]
        as_rgba = clean[:12] + header + zlib.crc32(header).to_bytes(4) + clean[33:]
        values = _by_pillow(as_rgba, chunks, rgba=True)
        assert isinstance(values, np.ndarray)
        high, low = values[..., 0], values[..., 1]
    else:  # Pillow takes the high byte: in the wrong byte order it is the low one
        mode = _MODES[chunks.colour]
        high, low = (_by_pillow(clean, chunks, f"{mode};16{order}") for order in "BL")
        assert isinstance(high, np.ndarray)
        assert isinstance(low, np.ndarray)
    return Deep(high.astype(np.uint16) << 8 | low, white=65_535)


def _by_pillow(
    clean: bytes, chunks: PngChunks, raw_mode: str | None = None, *, rgba: bool = False
) -> np.ndarray | Deep:
    """The pixels as `common.rgb`, or (h, w, 4) with `rgba`. `raw_mode`: how Pillow unpacks them."""
    with open_image(clean, ("PNG",)) as image:
        if raw_mode is not None:
            assert isinstance(image, ImageFile.ImageFile)
            tile = image.tile[0]
            tile = tile._replace(args=raw_mode) if hasattr(tile, "_replace") else (*tile[:3], raw_mode)
            image.tile = [tile]  # pyright: ignore[reportAttributeAccessIssue] - a tuple before Pillow 11
        pixels = np.asarray(image) if rgba or chunks.colour == 3 else rgb(image)
        # Pillow does not notice that the image data ends early: the rows that are missing are then zeros.
        last = (pixels.values if isinstance(pixels, Deep) else pixels)[-1]
        if (chunks.interlaced or not last.any()) and not _has_all_rows(clean, chunks):
            raise OSError("the PNG data is truncated: rows are missing")
        return rgb(image) if chunks.colour == 3 else pixels


def _has_all_rows(clean: bytes, chunks: PngChunks) -> bool:
    """Whether the image data decompresses to all rows."""
    parts = read_chunks(clean).image
    return len(_rows(clean, parts, _raw_bytes(chunks), cut=False)) >= _raw_bytes(chunks)


def _clean(data: bytes, chunks: PngChunks) -> bytes:
    """A PNG of the chunks that make pixels: Pillow refuses damaged and large ones of other kinds."""
    image = chunks.image
    if chunks.header == (8, 33) and image[0][0] == 33 and data.endswith(_EMPTY_END) and not chunks.resumed:
        at = 33
        for first, end in image:
            if first != at:
                break
            at = end
        else:
            if at + 12 == len(data):
                return data
    parts = [chunks.header, *([chunks.palette] if chunks.palette else []), *image]
    return b"".join([SIGNATURE, *(data[first:end] for first, end in parts), _EMPTY_END])


def _check_stream(data: bytes, chunks: PngChunks) -> None:
    """Raises ValueError unless the image data is one complete stream: a chunk of it may be what was damaged."""
    stream = zlib.decompressobj()
    try:
        for first, end in chunks.image:
            stream.decompress(data[first + 8 : end - 4], 0 if stream.eof else 2**31)
    except zlib.error as error:
        raise ValueError("its PNG image data is damaged") from error
    if not stream.eof:
        raise ValueError("the PNG data is truncated or damaged")


def _padded(data: bytes, chunks: PngChunks) -> bytes:
    """A PNG of the rows that are there, and zeros for the others."""
    needed = _raw_bytes(chunks)
    rows = _rows(data, chunks.image, needed, cut=chunks.cut)
    content = b"IDAT" + zlib.compress(rows.ljust(needed, b"\0"), 1)
    image = (len(content) - 4).to_bytes(4) + content + zlib.crc32(content).to_bytes(4)
    parts = [chunks.header, *([chunks.palette] if chunks.palette else [])]
    return b"".join([SIGNATURE, *(data[first:end] for first, end in parts), image, _EMPTY_END])


def _rows(data: bytes, parts: tuple[tuple[int, int], ...], needed: int, *, cut: bool) -> bytes:
    """At most the first `needed` bytes of the rows, as far as they decompress. `cut`: the last part has no checksum."""
    stream, rows = zlib.decompressobj(), []
    for first, end in parts:
        content = data[first + 8 : end - (0 if cut and end == len(data) else 4)]
        try:
            rows.append(stream.decompress(content, needed))
        except zlib.error:
            break
        needed -= len(rows[-1])
        if needed <= 0 or stream.eof:
            break
    return b"".join(rows)


def _raw_bytes(chunks: PngChunks) -> int:
    """Bytes of all rows with their filter bytes, as they are compressed; interlaced rows are those of 7 passes."""
    passes = ((0, 0, 1, 1),)
    if chunks.interlaced:
        passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    total = 0
    for left, top, right, down in passes:
        width, height = -(-(chunks.width - left) // right), -(-(chunks.height - top) // down)
        if width > 0 and height > 0:
            total += height * (1 + -(-width * chunks.bits * _CHANNELS[chunks.colour] // 8))
    return total
