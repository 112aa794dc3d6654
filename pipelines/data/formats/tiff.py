"""TIFF: which layouts are supported, and how their samples become pixels.

libtiff, in Pillow, decompresses (`tiff_samples`). What the samples mean, their planes, bits, byte order, sign and
colours, is decided here from the file's own tags, since Pillow assumes it: some layouts would be decoded to wrong
pixels without an error. A layout is supported as it is listed here, or refused in one line.

    photometric       samples (those behind them must be alpha or, after RGB, CMYK and palettes, anything)
    WhiteIsZero, BlackIsZero   1, or 3 taken as red, green and blue
    RGB               3
    palette           1
    separated (CMYK)  4
    YCbCr             3, of 8 bits

If other channels than 3 are asked for, WhiteIsZero, BlackIsZero and RGB have as many samples, whatever these mean.

Whole is a TIFF whose strips or tiles all lie in the file, and decompress to all their bytes. Tags that decoding does
not need may be damaged.

h, w height and width as stored
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipelines.data.formats import tiff_tags as t
from pipelines.data.formats.bands import BandsError
from pipelines.data.formats.common import TRUNCATED, Picture, check_size, open_image, rgb
from pipelines.data.formats.deep import Deep
from pipelines.data.formats.tiff_samples import CODECS, Layout, cut_segments, read_samples
from pipelines.data.formats.unsupported import UnsupportedError

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _MASK, _SEPARATED, _YCBCR = range(7)
_PHOTOMETRICS = {_MASK: "a transparency mask", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw camera data (CFA)"}
_PHOTOMETRICS |= {32844: "LogL", 32845: "LogLuv", 34892: "raw camera data (linear)"}
_OLD_JPEG, _JPEG, _CCITT = 6, 7, (2, 3, 4)
_COMPRESSIONS = {34887: "LERC", 34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50002: "JPEG XL"}
_COMPRESSIONS |= {
    52546: "JPEG XL",
    50001: "WebP",
    34933: "PNG",
    32809: "ThunderScan",
    34676: "SGILog",
    34677: "SGILog24",
    32771: "CCITT RLE/W",
}
_CONVERT = "convert it, for example with `gdal_translate` or ImageMagick"
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4


def decode(data: bytes, accept: bool, channels: int = 3) -> Picture:
    """The first image. `accept`: with strips or tiles that are cut off too, as zeros.

    Raises BandsError where the samples are other than the channels that were asked for.
    """
    tags = t.read_tags(data)
    layout = _layout(tags)
    _check_is_the_image(tags)
    cut = cut_segments(layout, len(data))
    if cut and not accept:
        raise ValueError(
            f"the TIFF data is truncated: {cut:,} of its {len(layout.offsets):,} strips or tiles are cut off"
        )
    photometric = tags.one(t.PHOTOMETRIC, _BLACK_IS_ZERO)
    if _for_pillow(layout, photometric):
        if cut:
            raise ValueError("the TIFF data is truncated, and with its compression no part can be used")
        pixels = _by_pillow(data, tags, layout, photometric)
    else:
        chosen = _bands(tags, layout, photometric, channels)
        pixels = _pixels(read_samples(data, tags, layout, accept=bool(cut)), tags, layout, photometric, chosen)
    turned = tags.one(t.ORIENTATION, 1)
    kind = f"TIFF {_mode(layout, photometric, channels)}"
    return Picture(pixels, kind, turned if turned in range(1, 9) else 1, TRUNCATED if cut else "")


def _layout(tags: t.TiffTags) -> Layout:
    """How the samples are stored. Raises ValueError if tags are missing, contradict each other or are unsupported."""
    width, height = tags.one(t.WIDTH, 0), tags.one(t.LENGTH, 0)
    check_size(width, height)
    samples = tags.one(t.SAMPLES, 1)
    bits, formats = tags.values.get(t.BITS, (1,)), tags.values.get(t.SAMPLE_FORMAT, (_UNSIGNED,))
    if len(set(bits)) > 1 or len(set(formats)) > 1:
        what = "bits" if len(set(bits)) > 1 else "number formats"
        raise UnsupportedError(f"it is a TIFF whose channels have different {what}, which is not supported; {_CONVERT}")
    compression = tags.one(t.COMPRESSION, 1)
    if compression not in (*CODECS, _OLD_JPEG, _JPEG, *_CCITT):
        name = _COMPRESSIONS.get(compression, f"number {compression}")
        raise UnsupportedError(f"it is a TIFF with compression {name}, which is not supported; {_CONVERT}")
    tiled = t.TILE_OFFSETS in tags.values or t.TILE_WIDTH in tags.values
    offsets = tags.values.get(t.TILE_OFFSETS if tiled else t.STRIP_OFFSETS, ())
    lengths = tags.values.get(t.TILE_BYTES if tiled else t.STRIP_BYTES, ())
    layout = Layout(
        width=width,
        height=height,
        samples=samples,
        bits=int(bits[0]),
        format=_UNSIGNED if formats[0] == _UNDEFINED else int(formats[0]),
        compression=compression,
        predictor=tags.one(t.PREDICTOR, 1),
        planar=tags.one(t.PLANAR, 1) == 2 and samples > 1,
        tile=(tags.one(t.TILE_LENGTH, 0), tags.one(t.TILE_WIDTH, 0)) if tiled else None,
        rows_per_strip=min(tags.one(t.ROWS_PER_STRIP, height), height),
        offsets=tuple(int(offset) for offset in offsets),
        lengths=tuple(int(length) for length in lengths),
        order=tags.order,
        reversed_bits=tags.one(t.FILL_ORDER, 1) == 2,
    )
    layout.check()
    return layout


def _check_is_the_image(tags: t.TiffTags) -> None:
    """Raises ValueError for camera data, in which the first image is a preview."""
    if t.DNG_VERSION in tags.values or (t.SUB_IFDS in tags.values and tags.one(t.NEW_SUBFILE, 0) & 1):
        raise UnsupportedError(
            "it is raw camera data (DNG, NEF), whose first image is a preview: develop it to JPEG or TIFF"
        )


def _for_pillow(layout: Layout, photometric: int) -> bool:
    """Whether libtiff decodes colours, not only bytes: those compressions know what they compress."""
    return layout.compression in (_OLD_JPEG, _JPEG, *_CCITT) or photometric == _YCBCR


def _by_pillow(data: bytes, tags: t.TiffTags, layout: Layout, photometric: int) -> np.ndarray:
    """Pixels of the layouts that Pillow is known to read correctly. Raises ValueError for any other."""
    inverted, expected = photometric == _WHITE_IS_ZERO, {_RGB: (3,), _YCBCR: (3,)}.get(photometric, (1,))
    if layout.compression in _CCITT:
        right = layout.bits == 1 and layout.samples == 1 and photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
    else:
        right = layout.bits == 8 and layout.format == _UNSIGNED and not layout.reversed_bits
        right &= photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR)
        right &= layout.samples in expected
        right &= not layout.planar or (layout.compression == _JPEG and photometric != _YCBCR)
    if not right:
        raise UnsupportedError(f"it is {_describe(layout, photometric)}, which is not supported; {_CONVERT}")
    if layout.planar:
        return np.stack([_grey(data, tags, plane) for plane in layout.planes()], axis=2)
    changed: dict[int, tuple[int, ...]] = {t.PHOTOMETRIC: (_BLACK_IS_ZERO,)} if inverted else {}
    with open_image(t.with_tags(data, tags, changed), ("TIFF",)) as image:
        pixels = rgb(image)
    assert not isinstance(pixels, Deep)
    return 255 - pixels if inverted else pixels


def _grey(data: bytes, tags: t.TiffTags, plane: Layout) -> np.ndarray:
    """(h, w) uint8 of one plane, as an image of its own."""
    changed = plane.tags() | {t.PHOTOMETRIC: (_BLACK_IS_ZERO,), t.BITS: (8,), t.PLANAR: (1,), t.SAMPLE_FORMAT: (1,)}
    kept = t.TiffTags(tags.order, {tag: v for tag, v in tags.values.items() if tag != t.EXTRA_SAMPLES}, tags.types)
    with open_image(t.with_tags(data, kept, changed), ("TIFF",)) as image:
        return np.asarray(image.convert("L"))


def _bands(tags: t.TiffTags, layout: Layout, photometric: int, channels: int) -> int:
    """How many of the samples are colours or bands to use, before they are read."""
    count, extra = layout.samples, tags.values.get(t.EXTRA_SAMPLES, ())
    colours = {_RGB: 3, _PALETTE: 1, _SEPARATED: 4}.get(photometric, 0)
    grey = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
    if grey:
        colours = count - (bool(extra) and extra[-1] in (1, 2))
        if channels == 3 and colours not in (1, 3):
            raise BandsError(
                count,
                channels,
                f"it is a TIFF of {count} bands; expected 1 (grey) or 3 (red, green, blue), and alpha: give --channels "
                f"{count}, or choose three, for example with `gdal_translate -b 4 -b 3 -b 2`",
            )
    if not colours or count < colours:
        raise UnsupportedError(f"it is {_describe(layout, photometric)}, which is not supported; {_CONVERT}")
    if channels == 3 or not (grey or photometric == _RGB):
        return colours
    if count == channels:
        return count
    if colours != channels and not (channels == 1 and colours == 3):
        raise BandsError(count, channels)
    return colours


def _pixels(samples: np.ndarray, tags: t.TiffTags, layout: Layout, photometric: int, colours: int) -> np.ndarray | Deep:
    """(h, w, samples) values, of which the first `colours` are used → (h, w, 3 or bands) uint8, or more bits."""
    unsigned = layout.format == _UNSIGNED
    samples = samples[..., :colours]
    if photometric == _PALETTE:
        return _palette(samples[..., 0], tags, layout)
    if photometric == _SEPARATED:
        if tags.one(t.INK_SET, 1) != 1 or layout.bits not in (8, 16) or not unsigned:
            raise UnsupportedError(f"it is {_describe(layout, photometric)}, which is not supported; {_CONVERT}")
        inks = np.ascontiguousarray(samples if layout.bits == 8 else (samples >> 8).astype(np.uint8))
        return np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))
    inverted = photometric == _WHITE_IS_ZERO
    if unsigned and layout.bits <= 8:
        white = 2**layout.bits - 1
        grey = samples if white == 255 else ((samples.astype(np.uint16) * 255 + white // 2) // white).astype(np.uint8)
        grey = 255 - grey if inverted else grey
        return np.repeat(grey, 3, axis=2) if colours == 1 else np.ascontiguousarray(grey)
    white = 2**layout.bits - 1 if unsigned and layout.bits <= 16 else None
    return Deep(samples[..., 0] if colours == 1 else samples, white, inverted)


def _palette(indices: np.ndarray, tags: t.TiffTags, layout: Layout) -> np.ndarray:
    colours = np.array(tags.values.get(t.COLOUR_MAP, ()), dtype=np.int64)
    if layout.format != _UNSIGNED or layout.bits > 16 or len(colours) != 3 * 2**layout.bits:
        raise UnsupportedError(f"it is {_describe(layout, _PALETTE)} without a palette of that size; {_CONVERT}")
    if colours.max() > 255:  # else they were written with 8 bits instead of 16, as libtiff assumes too
        colours >>= 8
    return colours.reshape(3, -1).T.astype(np.uint8)[indices]


def _mode(layout: Layout, photometric: int, channels: int) -> str:
    name = {_RGB: "RGB", _PALETTE: "P", _SEPARATED: "CMYK", _YCBCR: "YCbCr"}.get(photometric, "L")
    if channels not in (1, 3) and name in ("L", "RGB"):
        name = f"{layout.samples} bands"
    elif name == "L" and layout.samples >= 3:
        name = "RGB"
    suffix = {_UNSIGNED: "", _SIGNED: "S", _FLOAT: "F"}.get(layout.format, "")
    return name if (layout.bits, suffix) == (8, "") else f"{name};{layout.bits}{suffix}"


def _describe(layout: Layout, photometric: int) -> str:
    """What the file is, for messages: `a TIFF of 3 channels of 16 bits, CIELab`."""
    names = {_WHITE_IS_ZERO: "grey", _BLACK_IS_ZERO: "grey", _RGB: "RGB", _PALETTE: "palette", _SEPARATED: "separated"}
    name = (names | {_YCBCR: "YCbCr"} | _PHOTOMETRICS).get(photometric, f"photometric interpretation {photometric}")
    planes = ", in planes" if layout.planar else ""
    compression = {_OLD_JPEG: ", old JPEG", _JPEG: ", JPEG"}.get(layout.compression, "")
    channels = f"{layout.samples} {'channel' if layout.samples == 1 else 'channels'}"
    return f"a TIFF of {channels} of {layout.bits} bits, {name}{compression}{planes}"
