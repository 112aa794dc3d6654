"""Which files are images: by their names where these tell, by their first bytes where they do not."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.platforms import read_at
from pipelines.reads import Timed, open_regular

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_OTHERS = """
    txt text md rst log csv tsv json jsonl ndjson xml yaml yml toml ini cfg conf html htm css js ts tex bib pdf doc
    docx xls xlsx ppt pptx odt ods py pyc ipynb sh bat c cc cpp h hpp cu java m r lua go rs url exe dll so lock
    sha256 md5 pkl pickle npy npz mat h5 hdf5 pt pth ckpt onnx pb tflite safetensors beton bin lmdb mdb db sqlite
    parquet arrow feather rec idx tfrecord cls caption obj ply stl pcd zip tar gz tgz bz2 xz zst 7z rar part tmp bak
    mp4 avi mov mkv webm mpg mpeg wmv flv m4v mp3 wav flac ogg svg eps ps ai psd xcf heic heif avif jp2 j2k jxl exr
    hdr dcm nii mha nef cr2 cr3 arw dng orf rw2 raf pef srw raw
"""
OTHERS = frozenset(f".{name}" for name in _OTHERS.split())
"""Extensions of files that are not opened: they hold no image, or one that is not decoded. (Raw files of cameras begin
like TIFF.)"""
ARRAY = ".npy"
"""The extension of NumPy arrays, which are images where there are no others: beside these they are anything."""
HEAD_BYTES = 32

_IMAGES = frozenset(EXTENSIONS)
_NETPBM = re.compile(rb"P[1-6]\s+(\d|#)")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes of the versions of its second header
_THREADS, _FILES_PER_TASK = 16, 64


def extension(name: str) -> str:
    """The last extension of a file's name, in lower case with its dot; empty without one."""
    stem, _, last = name.rpartition(".")
    return f".{last.lower()}" if stem else ""


def may_be_image(name: str) -> bool | None:
    """Whether a file of this name is taken for an image; None if its content must tell."""
    kind = extension(name)
    return True if kind in _IMAGES else False if kind in OTHERS else None


def begins_like_image(head: bytes) -> bool:
    """Whether a file with these first bytes has a format that is decoded."""
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or head.startswith((b"II*\0", b"MM\0*", b"II+\0\x08\0", b"MM\0+\0\x08"))
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or (head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS)
        or _NETPBM.match(head) is not None
    )


def is_image(path: str) -> bool:
    """Whether the file at `path` begins like an image. False if it cannot be read."""
    try:
        with Timed(path):
            descriptor, _ = open_regular(path)
            try:
                return begins_like_image(read_at(descriptor, HEAD_BYTES, 0))
            finally:
                os.close(descriptor)
    except OSError:
        return False


def are_images(paths: Sequence[str]) -> list[bool]:
    """`is_image` of every path; on several threads, since they wait for the disk."""
    if len(paths) <= _FILES_PER_TASK:
        return [is_image(path) for path in paths]
    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for task in pool.map(lambda task: [is_image(path) for path in task], tasks) for found in task]


def describe_others(others: Mapping[str, int], most: int = 4) -> str:
    """`9 files: 6 .txt, 2 .json, 1 without an extension`: files that are no images, by extension."""
    kinds = Counter(others).most_common()
    total = sum(others.values())
    shown = [f"{count:,} {kind or 'without an extension'}" for kind, count in kinds[:most]]
    if len(kinds) > most:
        shown.append(f"{sum(count for _, count in kinds[most:]):,} of {len(kinds) - most:,} other kinds")
    return f"{total:,} file{'s' * (total != 1)}: {', '.join(shown)}"
