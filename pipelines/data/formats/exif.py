"""The orientation in EXIF data, without reading anything else of it."""

from __future__ import annotations

import struct

DAMAGED = "damaged EXIF data"

_ORIENTATION = 0x0112
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}


def orientation(exif: bytes) -> tuple[int, str]:
    """(1 to 8, fault) of the stored pixels: 1 is upright, also if the tag is missing or invalid.

    exif  a TIFF header and its directory, after `Exif\\0\\0` or not

    Damaged metadata is no bad image: viewers show it as stored. The fault is then `DAMAGED`, else empty.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1, DAMAGED
    (at,) = struct.unpack_from(order + "I", exif, 4)
    if at + 2 > len(exif):
        return 1, DAMAGED
    (count,) = struct.unpack_from(order + "H", exif, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if entry + 12 > len(exif):
            return 1, DAMAGED
        tag, kind, number = struct.unpack_from(order + "HHI", exif, entry)
        if tag == _ORIENTATION and number == 1 and kind in (3, 4):  # SHORT or LONG
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, entry + 8)
            return (value if value in range(1, 9) else 1), ""
    return 1, ""
