"""JPEG (ITU-T T.81), decoded by libjpeg-turbo.

Whole is a JPEG with an end marker after its image data, or without one if all its blocks are there: then its pixels do
not depend on what follows the last byte. Missing blocks would be grey. Everything that is no pixel (application data,
comments, bytes between segments) may be damaged.

h, w height and width as stored
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
import torchvision  # noqa: F401 - registers torch.ops.image

from pipelines.data.formats.common import TRUNCATED, Picture, check_size, join, open_image, rgb
from pipelines.data.formats.deep import Deep
from pipelines.data.formats.exif import orientation
from pipelines.data.formats.unsupported import UnsupportedError

END = b"\xff\xd9"  # not inside compressed data, where FF is followed by 00 or a restart marker
NO_END, DISORDERLY = "a JPEG without end marker", "stray bytes between JPEG segments"

_SOF, _SOS, _DRI, _APP0, _APP1, _APP14, _COM = range(0xC0, 0xD0), 0xDA, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # DHT, JPG and DAC, in the middle of the frame markers
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a segment
_RGB_MODE = 3  # torchvision.io.ImageReadMode.RGB
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
# What may follow truncated data: different bits, which would decode to different coefficients.
_FILLERS = (b"\x55" * 64, b"\xaa" * 64, bytes(i * i * 31 % 251 for i in range(1, 65)))
_SLACK = 4  # bytes of a group of blocks that are all the same
_MIN_ZEROS, _MAX_ZEROS = 8, 64  # zeros at the end that may be image data: fewer are, more are space never filled


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What stands before the first scan.

    frame     position of the frame header's content: precision, height, width, components
    process   marker of the frame
    kept      (first, end) of every segment that decoding needs
    exif      of the first EXIF segment
    scan      position of the first byte of compressed data
    faults    what of the metadata is damaged
    """

    height: int
    width: int
    precision: int
    components: int
    frame: int
    process: int
    kept: tuple[tuple[int, int], ...]
    exif: bytes | None
    scan: int
    faults: tuple[str, ...]

    def oriented(self) -> tuple[int, list[str]]:
        """The orientation, and all faults of the metadata."""
        if self.exif is None:
            return 1, [*self.faults]
        turned, fault = orientation(self.exif)
        return turned, [*self.faults, *([fault] if fault else [])]


def read_header(data: bytes) -> JpegHeader:
    """The header of a JPEG. Raises ValueError if it is not complete."""
    frame, process, exif, kept, faults, at = 0, 0, None, [], [], 2
    while True:
        first = data.find(b"\xff", at)
        marker_at = first + 1
        while first >= 0 and data[marker_at : marker_at + 1] == b"\xff":  # fill bytes
            marker_at += 1
        if first < 0 or marker_at + 3 > len(data):
            raise ValueError("the JPEG data is truncated: its header is not complete")
        marker = data[marker_at]
        if first != at or marker == 0:
            faults.append(DISORDERLY)
        if marker == 0 or marker in _ALONE:
            at = marker_at + 1
            continue
        length = int.from_bytes(data[marker_at + 1 : marker_at + 3])
        start, end = marker_at + 3, marker_at + 1 + length
        if marker == 0xD9 or length < 2:
            raise ValueError("it is a JPEG without image data, or its header is damaged")
        if end > len(data):
            raise ValueError("the JPEG data is truncated: its header is not complete")
        if marker == _SOS:
            break
        if marker == _APP1 and exif is None and data.startswith(b"Exif\0\0", start):
            exif = data[start:end]
        elif marker in _SOF and marker not in _NO_FRAMES:
            frame, process = start, marker
        if marker == _APP14 or not (_APP0 <= marker < _APP0 + 16 or marker == _COM):
            kept.append((marker_at - 1, end))
        at = end
    if not frame or len(data) < frame + 6:
        raise ValueError("it is a JPEG whose header says no size")
    precision, height, width, components = struct.unpack_from(">BHHB", data, frame)
    return JpegHeader(
        height, width, precision, components, frame, process, (*kept, (marker_at - 1, end)), exif, end, tuple(faults)
    )


def check(header: JpegHeader) -> None:
    """Raises ValueError for a JPEG of a kind that is not supported, whatever its data."""
    check_size(header.width, header.height)
    if header.precision != 8:
        raise UnsupportedError(
            f"it is a JPEG of {header.precision} bits per channel, and only 8 are supported; convert it to 16-bit PNG"
        )
    if header.components not in (1, 3, 4):
        raise ValueError(f"it is a JPEG of {header.components} channels; expected 1 (grey), 3 (colour) or 4 (CMYK)")


def decode(data: bytes, accept: bool) -> Picture:
    """The pixels of a JPEG. `accept`: with missing blocks too, as grey."""
    header = read_header(data)
    check(header)
    turned, faults = header.oriented()
    if data.rfind(END, header.scan) < 0:
        body, whole = _body(data, header)
        if not whole and not accept:
            raise ValueError("the JPEG data is incomplete or truncated")
        faults.append(NO_END if whole else TRUNCATED)
        data = body + END
    pixels = _by_pillow(data, header) if TRUNCATED in faults else _decode(data, header)
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[header.components]
    return Picture(pixels, f"JPEG {mode}", turned, join(faults))


def _decode(data: bytes, header: JpegHeader) -> np.ndarray:
    """(h, w, 3) uint8, of grey and colour by the operator behind `torchvision.io.decode_jpeg`.

    Its pixels equal Pillow's, bit for bit (both use libjpeg-turbo), in a third of the time at 32 px, two thirds at 224
    px and five sixths at 500 px. torchvision has announced its removal; then Pillow is used.
    """
    if header.components != 4 and hasattr(torch.ops.image, "decode_jpeg"):
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns about read-only memory
        return torch.ops.image.decode_jpeg(encoded, _RGB_MODE, False).permute(1, 2, 0).numpy()
    return _by_pillow(data, header)


def _by_pillow(data: bytes, header: JpegHeader) -> np.ndarray:
    """(h, w, 3) uint8, from the segments that make pixels: Pillow refuses damage in others. Prints no warnings."""
    parts = [b"\xff\xd8", *(data[first:end] for first, end in header.kept), data[header.scan :]]
    with open_image(b"".join(parts), ("JPEG",)) as image:
        pixels = rgb(image)
    assert not isinstance(pixels, Deep)
    return pixels


def _body(data: bytes, header: JpegHeader) -> tuple[bytes, bool]:
    """A JPEG without end marker up to where its image data ends, and whether that is all of it.

    A download into allocated space ends in zeros, which would decode to blocks. They are image data only if all of them
    are needed, up to the few bytes of one group of blocks. FF at the end is half a marker.
    """
    bare = data.rstrip(b"\0")
    if len(data) - len(bare) < _MIN_ZEROS:
        body = data.rstrip(b"\xff")
        return body, _is_whole(body, header)
    body = bare.rstrip(b"\xff")
    if _is_whole(body, header):
        return body, True
    if len(data) - len(bare) <= _MAX_ZEROS and _is_whole(data, header) and not _is_whole(data[:-_SLACK], header):
        return data, True
    return body, False


def _is_whole(data: bytes, header: JpegHeader) -> bool:
    """Whether a JPEG without end marker has all its blocks: then its pixels do not depend on what follows."""
    if header.process in _LOSSLESS or len(data) <= header.scan or not _has_all_scans(data, header):
        return False
    padded = _in_whole_blocks(data, header)
    try:
        first, *others = (_by_pillow(padded + filler + END, header) for filler in _fillers(data, header))
    except OSError:
        return False
    return all(np.array_equal(first, other) for other in others)


def _fillers(data: bytes, header: JpegHeader) -> list[bytes]:
    """Nothing, and bits that cannot all mean the same; after each of the restart markers too, if there are any."""
    if not any(data[first + 1] == _DRI for first, _ in header.kept):
        return [b"", *_FILLERS]
    last = max(range(8), key=lambda i: data.rfind(bytes([0xFF, 0xD0 + i]), header.scan))
    orders = [range(last + 1, last + 9), range(8)]  # the next one of this scan, or the first one of a new scan
    markers = [[bytes([0xFF, 0xD0 + i % 8]) for i in order] for order in orders]
    return [b"", *(bits + b"".join(marker + bits for marker in order) for order in markers for bits in _FILLERS)]


def _in_whole_blocks(data: bytes, header: JpegHeader) -> bytes:
    """The JPEG with sides rounded up to blocks of 8: as many blocks, and all of the last ones is seen."""
    height, width = (-(-side // 8) * 8 for side in (header.height, header.width))
    if max(height, width) > 65_500:  # libjpeg's limit
        return data
    return data[: header.frame + 1] + struct.pack(">HH", height, width) + data[header.frame + 5 :]


def _has_all_scans(data: bytes, header: JpegHeader) -> bool:
    """Whether the scans cover every coefficient of every component to its last bit (T.81, B.2.3)."""
    ids = data[header.frame + 6 : header.frame + 6 + 3 * header.components : 3]
    missing = {identity: np.full(64, 99) for identity in ids}  # bits that are still to come, by coefficient
    at = header.kept[-1][0]
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if at + 2 + length > len(data):
            return False
        if marker == _SOS:
            count = data[at + 4]
            first, last, bits = data[at + 5 + 2 * count], data[at + 6 + 2 * count], data[at + 7 + 2 * count] & 15
            for identity in data[at + 5 : at + 5 + 2 * count : 2]:
                if identity in missing:
                    missing[identity][first : last + 1] = bits
        at += 2 + length
        while True:  # to the next marker, past the compressed data
            at = data.find(b"\xff", at)
            if at < 0 or at + 4 > len(data):
                return not any(left.any() for left in missing.values())
            if data[at + 1] == 0xFF:
                at += 1
            elif data[at + 1] == 0 or data[at + 1] in _ALONE:
                at += 2
            else:
                break
