"""Names files that are no supported image, by their first bytes, with the remedy."""

from __future__ import annotations

# (offset, bytes, what it is, remedy)
_SIGNATURES = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`"),
    (0, b"\x1f\x8b", "compressed with gzip", "decompress it with `gunzip < FILE > NEW`"),
    (0, b"BZh", "compressed with bzip2", "decompress it with `bunzip2 < FILE > NEW`"),
    (0, b"\xfd7zXZ\0", "compressed with xz", "decompress it with `unxz < FILE > NEW`"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it with `unzstd < FILE > NEW`"),
    (0, b"PK\3\4", "a zip archive", "unzip it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "extract it with `7z x`"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "extract it with `unrar x`"),
    (257, b"ustar", "a tar archive", "give archives in a folder of their own, or extract it"),
    (0, b"8BPS", "a Photoshop document", "save it as PNG or JPEG"),
    (0, b"%PDF", "a PDF", "convert its pages with `pdftoppm -png`"),
    (0, b"%!PS", "PostScript", "convert it with `gs -sDEVICE=png16m`"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", "convert it with `opj_decompress` or ImageMagick"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000", "convert it with `opj_decompress` or ImageMagick"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "convert it with `djxl`"),
    (0, b"\xff\x0a", "JPEG XL", "convert it with `djxl`"),
    (128, b"DICM", "DICOM", "convert it to 16-bit PNG or TIFF, for example with pydicom"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", "save its images as PNG or TIFF"),
    (0, b"MATLAB 5.0", "a MATLAB file", "save its images as PNG or TIFF"),
    (0, b"SIMPLE  =", "FITS", "convert it to 16-bit TIFF, for example with astropy"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR", "convert it to PNG or TIFF"),
    (0, b"#?RADIANCE", "Radiance HDR", "convert it to PNG or TIFF"),
    (0, b"DDS ", "a DDS texture", "convert it to PNG with ImageMagick"),
    (0, b"\0\0\1\0", "an icon (ICO)", "convert it to PNG with ImageMagick"),
    (0, b"FUJIFILMCCD-RAW", "raw camera data (RAF)", "develop it to JPEG or TIFF"),
    (0, b"IIRO", "raw camera data (ORF)", "develop it to JPEG or TIFF"),
    (0, b"IIU\0", "raw camera data (RW2)", "develop it to JPEG or TIFF"),
    (8, b"AVI ", "a video (AVI)", "extract its frames with `ffmpeg`"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska, WebM)", "extract its frames with `ffmpeg`"),
    (0, b"\0\0\1\xba", "a video (MPEG)", "extract its frames with `ffmpeg`"),
    (0, b"\x7fELF", "a program", "remove it"),
)
# Brands of ISO base media files, which begin with a box `ftyp`.
_BRANDS = (
    ((b"avif", b"avis"), "AVIF", "convert it with `avifdec` or ImageMagick"),
    ((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC", "convert it with `heif-convert`"),
    ((b"crx ",), "raw camera data (CR3)", "develop it to JPEG or TIFF"),
)
_DOWNLOAD = "the download failed; download it again"


class UnsupportedError(ValueError):
    """A file of a kind that is not supported, rather than a damaged one. The message ends with the remedy."""


def describe(data: bytes) -> str | None:
    """What these bytes are and what to do, as in `it is a zip archive: unzip it`; None if they are of no known kind."""
    for offset, signature, kind, remedy in _SIGNATURES:
        if data.startswith(signature, offset):
            return f"it is {kind}: {remedy}"
    if data[4:8] == b"ftyp":
        for brands, kind, remedy in _BRANDS:
            if data[8:12] in brands:
                return f"it is {kind}: {remedy}"
        return "it is a video (MP4, QuickTime): extract its frames with `ffmpeg`"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"it is an HTML page: {_DOWNLOAD}"
    if b"<svg" in text and text.startswith(b"<"):
        return "it is SVG, which has no pixels: convert it with `rsvg-convert`"
    if text.startswith(b"<?xml"):
        return f"it is XML: {_DOWNLOAD}"
    if text.startswith((b'{"', b'[{"')):
        return f"it is JSON: {_DOWNLOAD}"
    if not data[:4096].strip(b"\0"):
        return "it begins with zeros alone: its copy or download did not finish"
    return None
