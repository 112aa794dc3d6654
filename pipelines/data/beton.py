"""Reads `.beton` files: their index, after checks of what the file holds against its manifest.

`data.beton_format` describes the file, `data.beton_manifest` its manifest.

N images · H, W height and width in pixels
"""

from __future__ import annotations

import hashlib
import os
from io import BufferedReader, FileIO

import numpy as np

from pipelines.data.beton_format import NO_LABEL, RAW, REMEDY, Tables, read_tables
from pipelines.data.beton_manifest import EARLIER_FORMAT, BetonManifest, read_manifest
from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex, PackedRecords
from pipelines.data.record_digests import RecordDigests
from pipelines.errors import DataError
from pipelines.platforms import read_at

END = b"\xff\xd9"  # does not occur in the compressed data of a JPEG

HASHED_BYTES = 2**30  # files up to this size are hashed completely at every start, in about a second


def read_index(path: str) -> ImageIndex:
    """The index of a complete `.beton` file. Raises DataError with one line of what is wrong.

    The tables are always checked. In files of up to `HASHED_BYTES` all images are hashed now, in longer ones each when
    it is first read. In longer files of EARLIER_FORMAT, which has no digests of images, every JPEG must begin with a
    header of the right size and have its end marker.
    """
    path = os.path.abspath(path)
    try:
        with open(path, "rb") as file:
            manifest = read_manifest(path)
            return checked_index(file, path, manifest, every_image=manifest.bytes <= HASHED_BYTES)
    except OSError as error:
        shown = printable(path)
        raise DataError(f"cannot read {shown} ({error.strerror or error}); expected a .beton file") from error


def checked_index(
    file: BufferedReader | FileIO, path: str, manifest: BetonManifest, *, every_image: bool
) -> ImageIndex:
    """The index of the open file that is, or will be, at `path`.

    every_image  hash all images now, and check that each is one that decoders take

    Raises DataError for whatever differs from the manifest, and OSError.
    """
    shown = printable(path)
    length = os.fstat(file.fileno()).st_size
    if length != manifest.bytes:
        raise DataError(f"{shown} has {length:,} bytes, but {manifest.bytes:,} in its manifest; {REMEDY}")
    tables = read_tables(file, shown)
    if len(tables.samples) != manifest.images:
        raise DataError(
            f"{shown} has {len(tables.samples):,} images, but {manifest.images:,} in its manifest; {REMEDY}"
        )
    if tables.sha256 != manifest.tables_sha256:
        raise DataError(f"the tables of {shown} have changed since they were written (SHA-256 differs); {REMEDY}")
    index = _index(path, tables, manifest)
    if manifest.format == EARLIER_FORMAT:
        if every_image:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.file_sha256:
                raise DataError(f"{shown} has changed since it was written (SHA-256 differs); {REMEDY}")
        _check_jpegs(file, index)
    elif every_image:
        _check_images(file, index)
    return index


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from the first frame header of a JPEG, or None if `data` has none (ITU T.81, B.1 and B.2)."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def is_whole_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Whether `data` is a JPEG of (height, width) pixels that a `.beton` file may hold; others are stored as pixels.

    Stricter than `decode.decode`: between its segments nothing else may stand, and it has an end marker.
    """
    return jpeg_size(data) == size and END in data


def _index(path: str, tables: Tables, manifest: BetonManifest) -> ImageIndex:
    samples, shown = tables.samples, printable(path)
    digests = None
    if manifest.format != EARLIER_FORMAT:
        try:
            digests = RecordDigests.from_text(manifest.image_digests, len(samples))
        except ValueError as error:
            raise DataError(f"the manifest of {shown} is not usable: {error}; {REMEDY}") from error
    raw = samples["mode"] == RAW
    files, offsets = np.zeros(len(samples), dtype=np.int32), samples["pointer"].astype(np.int64)
    records = PackedRecords((path,), files, offsets, tables.lengths, raw, tuple(manifest.names), digests)
    sizes = np.stack([samples["height"], samples["width"]], axis=1).astype(np.int32)
    labels = _labels(samples["label"], manifest, shown)
    return ImageIndex(manifest.dataset, sizes, labels, tuple(manifest.class_names), records=records)


def _labels(labels: np.ndarray, manifest: BetonManifest, shown: str) -> np.ndarray | None:
    classes = len(manifest.class_names)
    if classes == 0 and (labels == NO_LABEL).all():
        return None
    if labels.min() < 0 or labels.max() >= classes:
        bounds = f"labels {labels.min()} to {labels.max()}"
        raise DataError(f"{shown} has {bounds}, but {classes} classes in its manifest; {REMEDY}")
    return labels.astype(np.int64)


def _check_images(file: BufferedReader | FileIO, index: ImageIndex) -> None:
    """Compares every image with its digest, and checks that it is pixels, or a JPEG of its size."""
    records = index.records
    assert records is not None
    assert records.digests is not None
    descriptor, sizes, raw = file.fileno(), index.sizes.tolist(), records.raw.tolist()
    offsets, lengths = records.offsets.tolist(), records.lengths.tolist()
    for i in range(len(index)):
        data = read_at(descriptor, lengths[i], offsets[i])
        if not records.digests.is_intact(i, data):
            raise records.damaged(i)
        if not raw[i] and not is_whole_jpeg(data, tuple(sizes[i])):
            raise _not_whole(index, i, jpeg_size(data) if END in data else None)


def _check_jpegs(file: BufferedReader | FileIO, index: ImageIndex) -> None:
    """Checks the first and last bytes of every JPEG."""
    records = index.records
    assert records is not None
    descriptor, sizes = file.fileno(), index.sizes.tolist()
    offsets, lengths = records.offsets.tolist(), records.lengths.tolist()
    for i in np.flatnonzero(~records.raw).tolist():
        start, length = offsets[i], lengths[i]
        size = jpeg_size(read_at(descriptor, min(length, 1024), start))
        tail = min(length, 4096)
        complete = END in read_at(descriptor, tail, start + length - tail)
        if size is None or not complete:  # a profile before the frame header, or other data after the end marker
            data = read_at(descriptor, length, start)
            size = jpeg_size(data) if END in data else None
        if size != tuple(sizes[i]):
            raise _not_whole(index, i, size)


def _not_whole(index: ImageIndex, i: int, size: tuple[int, int] | None) -> DataError:
    """Image i is a JPEG of `size` (height, width), or None of no size, rather than what its tables say."""
    height, width = index.sizes[i].tolist()
    actual = "not a complete JPEG" if size is None else f"a JPEG of {size[1]}×{size[0]} pixels"
    return DataError(f"{index.display_name(i)} is {actual}, expected {width}×{height}; {REMEDY}")
