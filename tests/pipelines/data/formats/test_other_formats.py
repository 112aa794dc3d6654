"""WebP, BMP, GIF and Netpbm with damaged metadata, unusual depths and missing ends; files of other kinds are named."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.dataset import load_dataset
from pipelines.data.decode import decode, examine
from pipelines.data.decoding import Decoding
from pipelines.data.formats.common import TRUNCATED
from pipelines.data.formats.others import DAMAGED_WEBP
from pipelines.errors import DataError
from tests.oddities import encode, exif, picture

RGB = picture(20, 31)
ACCEPT = Decoding(truncated="accept")


def webp_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_metadata_does_not_matter(lossless: bool):
    plain = encode(RGB, "WEBP", lossless=lossless, quality=95)
    whole, kind, content = decode(plain, "x"), plain[12:16], plain[20:]
    extended = struct.pack("<I", 0x28) + (30).to_bytes(3, "little") + (19).to_bytes(3, "little")
    with_exif = encode(RGB, "WEBP", lossless=lossless, quality=95, exif=exif(1), icc_profile=b"x" * 50)
    broken = webp_chunks((b"VP8X", extended), (b"ICCP", b"\xff" * 7), (kind, content), (b"EXIF", b"MM\0*\xff\xff\xff"))
    wrong_size = bytearray(with_exif)
    wrong_size[4:8] = b"\xff\xff\xff\x7f"
    cut_behind = with_exif[: with_exif.index(b"EXIF") + 9]
    for data in (with_exif, broken, bytes(wrong_size), cut_behind, plain + b"behind"):
        np.testing.assert_array_equal(decode(data, "x"), whole)
    assert examine(bytes(wrong_size), "x").tolerated == DAMAGED_WEBP
    for length in range(12, len(plain) - 1, max(1, len(plain) // 50)):
        for decoding in (Decoding(), ACCEPT):
            with pytest.raises(DataError):
                decode(plain[:length], "x", decoding)


def bmp(bits: int, compression: int, pixels: bytes, height: int = 4, masks: tuple[int, ...] = ()) -> bytes:
    """A BMP of 6 columns: file header, info header, masks, pixels."""
    extra = struct.pack(f"<{len(masks)}I", *masks)
    info = struct.pack("<IiiHHIIiiII", 40, 6, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    offset = 14 + len(info) + len(extra)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + info + extra + pixels


def test_bmp_of_16_and_32_bits():
    """Five or six bits a channel, in 16, are scaled to 255; 32 bits have masks; a height may be negative."""
    values = np.random.Generator(np.random.Philox(1)).integers(0, 32, (4, 6, 3))
    packed = (values << [10, 5, 0]).sum(axis=2).astype("<u2")
    exact = np.rint(values * 255 / 31)
    assert np.abs(decode(bmp(16, 0, packed[::-1].tobytes()), "x") - exact).max() <= 5  # ≪ 3 or ≫ 2, as decoders do
    upside = bmp(16, 0, packed.tobytes(), height=-4)
    np.testing.assert_array_equal(decode(upside, "x"), decode(bmp(16, 0, packed[::-1].tobytes()), "x"))
    green = values * [1, 2, 1]
    packed = (green << [11, 5, 0]).sum(axis=2).astype("<u2")
    data = bmp(16, 3, packed[::-1].tobytes(), masks=(0xF800, 0x07E0, 0x001F))
    assert np.abs(decode(data, "x") - green * 255 / [31, 63, 31]).max() <= 5
    full = np.random.Generator(np.random.Philox(2)).integers(0, 256, (4, 6, 4), np.uint8)
    data = bmp(32, 3, full[::-1].tobytes(), masks=(0xFF0000, 0xFF00, 0xFF))
    np.testing.assert_array_equal(decode(data, "x"), full[..., 2::-1])
    np.testing.assert_array_equal(decode(bmp(32, 0, full[::-1].tobytes()), "x"), full[..., 2::-1])


@pytest.mark.parametrize("kind", ["BMP", "PPM"])
def test_uncompressed_files_without_their_end(kind: str):
    rgb = picture(20, 32)
    data = encode(rgb, kind)
    for missing in (1, 50, 500):
        cut = data[:-missing]
        with pytest.raises(DataError, match="trunca"):
            decode(cut, "x")
        decoded = examine(cut, "x", ACCEPT)
        assert decoded.tolerated == TRUNCATED
        same = (decoded.pixels == rgb).all(axis=2).mean()
        assert 1 - missing / 3 / rgb[..., 0].size - 0.05 <= same < 1
    assert examine(data + b"behind", "x", ACCEPT).tolerated == ""
    wrong_size = bytearray(data)
    if kind == "BMP":
        wrong_size[2:6] = b"\1\2\3\4"  # the size of the file, which nobody reads
        np.testing.assert_array_equal(decode(bytes(wrong_size), "x"), rgb)


def test_truncated_values_of_16_bits():
    data = b"P6 31 20 65535\n" + (RGB.astype(">u2") * 257).tobytes()
    np.testing.assert_array_equal(decode(data, "x"), RGB)
    with pytest.raises(DataError, match="trunca"):
        decode(data[:-1], "x")
    decoded = examine(data[:-601], "x", ACCEPT)
    assert decoded.tolerated == TRUNCATED
    np.testing.assert_array_equal(decoded.pixels[:16], RGB[:16])
    with pytest.raises(DataError, match="its own maximum"):
        decode(b"P2 1 1 300 301", "x")


@pytest.mark.parametrize(("white", "values"), [(3, [0, 1, 2, 3]), (100, [0, 50, 100, 7]), (255, [0, 1, 254, 255])])
def test_netpbm_is_scaled_by_its_own_maximum(white: int, values: list[int]):
    want = np.repeat(np.rint(np.array(values) * 255 / white).reshape(1, 4, 1), 3, axis=2)
    np.testing.assert_array_equal(decode(b"P5 4 1 %d\n" % white + bytes(values), "x"), want)


def test_a_first_frame_that_does_not_fill_the_canvas():
    """GIF: the frame at its offset, the canvas around it in one colour; without its trailer too."""
    data = bytearray(encode(Image.fromarray(RGB[:10, :12]).quantize(16), "GIF"))
    frame = decode(bytes(data), "x")
    assert frame.shape == (10, 12, 3)
    at = data.index(b"\x2c\0\0\0\0\x0c\0\x0a\0")
    data[6:10] = struct.pack("<HH", 20, 16)
    data[at + 1 : at + 5] = struct.pack("<HH", 5, 3)
    for whole in (bytes(data), bytes(data[:-1]), bytes(data) + b"behind"):
        pixels = decode(whole, "x")
        assert pixels.shape == (16, 20, 3)
        np.testing.assert_array_equal(pixels[3:13, 5:17], frame)
        assert len(np.unique(pixels[14:].reshape(-1, 3), axis=0)) == 1


KINDS = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer: run `git lfs pull`"),
    (b"\n\n <html><head>", "an HTML page: the download failed"),
    (b"\xef\xbb\xbf<!DOCTYPE HTML PUBLIC", "an HTML page: the download failed"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied', "XML: the download failed"),
    (b'{"error": "not found"}', "JSON: the download failed"),
    (b'<svg xmlns="http://www.w3.org/2000/svg">', "SVG, which has no pixels: convert it"),
    (b'<?xml version="1.0"?>\n<svg width="3">', "SVG, which has no pixels: convert it"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: convert it with `heif-convert`"),
    (b"\0\0\0\x20ftypavif\0\0\0\0avif", "AVIF: convert it"),
    (b"\0\0\0\x20ftypisom\0\0\0\0isom", "a video (MP4, QuickTime): extract its frames"),
    (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw camera data (CR3): develop it"),
    (b"\0\0\0\x0cjP  \r\n\x87\n\0\0", "JPEG 2000: convert it"),
    (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000: convert it"),
    (b"\xff\x0a\0\0\0\0", "JPEG XL: convert it"),
    (b"8BPS\0\1", "a Photoshop document: save it"),
    (b"%PDF-1.7", "a PDF: convert its pages"),
    (bytes(128) + b"DICM\2\0", "DICOM: convert it"),
    (b"\x89HDF\r\n\x1a\n", "HDF5: save its images"),
    (b"PK\3\4\x14\0", "a zip archive: unzip it"),
    (b"\x1f\x8b\x08\0", "compressed with gzip: decompress it with `gunzip"),
    (b"BZh91AY", "compressed with bzip2"),
    (b"\xfd7zXZ\0\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd\0", "compressed with zstd"),
    (b"RIFF\0\0\0\0AVI LIST", "a video (AVI)"),
    (b"\x1a\x45\xdf\xa3\0", "a video (Matroska, WebM)"),
    (bytes(300), "zeros alone: its copy or download did not finish"),
    (b"plain text", "begins with b'plain text', which is none of JPEG, PNG"),
]


@pytest.mark.parametrize(("data", "message"), KINDS, ids=[message[:20] for _, message in KINDS])
def test_other_kinds_are_named_with_the_remedy(data: bytes, message: str):
    with pytest.raises(DataError) as caught:
        decode(data, "x.jpg")
    assert str(caught.value).startswith("x.jpg is not a usable image: it ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("program", "name"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_archive_named_tar(tmp_path: Path, program: str, name: str):
    (tmp_path / "a.png").write_bytes(encode(RGB, "PNG"))
    with tarfile.open(tmp_path / "x.tar", f"w:{program}") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        archive.add(tmp_path / "a.png", "a.png")
    with pytest.raises(DataError, match=rf"compressed with .*: decompress it with `{name} < FILE > NEW`") as caught:
        load_dataset(str(tmp_path / "x.tar"), data_root=tmp_path)
    assert "copy it again" not in str(caught.value)
