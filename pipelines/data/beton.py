"""FFCV's `.beton` format, version 2, as fastmoco writes and reads it: one file of images and tables of their offsets.

    header │ field table │ sample table │ 0…0 │ page │ page │ … │ allocation table        (little-endian)

    header        version, number of fields, bytes per page, N, offset of the allocation table
    field table   two fields: `image` (kind 2) and `label` (kind 1)
    sample table  N × (mode, width, height, offset of the bytes, label)
    pages         encoded images (mode 0) or H·W·3 bytes of RGB (mode 1); none crosses the end of a page
    allocations   N × (sample, offset of its bytes, their number), up to the end of the file

FFCV itself can read such a file. The format does not mark a file as complete: FFCV returns black images from a file
whose writer died, and other wrong pixels from a truncated one. So a manifest, `NAME.beton.json`, is written last, with
the number of bytes and hashes; a file without one is refused.

N images · H, W height and width in pixels
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from typing import IO, Any

import numpy as np

from pipelines.data.decode import MAX_PIXELS, printable
from pipelines.data.index import ImageIndex, PackedRecords
from pipelines.errors import DataError
from pipelines.platforms import read_at

VERSION = 2
JPG, RAW = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_bytes", "<u4"), ("samples", "<u8"), ("allocations_at", "<u8")]
)
FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
SAMPLE = np.dtype(  # FFCV aligns the label to 8 bytes and leaves the image's 13 unaligned
    {
        "names": ["mode", "width", "height", "pointer", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("length", "<u8")])
SAMPLES_AT = HEADER.itemsize + 2 * FIELD.itemsize
NO_LABEL = -1

END = b"\xff\xd9"  # does not occur in the compressed data of a JPEG

HASHED_BYTES = 2**30  # files up to this size are hashed completely at every start, in under a second
MANIFEST_FORMAT = "fastmoco beton 1"
REMEDY = "copy it again, or convert again with tools/make_ffcv.py"


def field_table() -> np.ndarray:
    """The two fields of every file, an image and an integer, both without arguments."""
    table = np.zeros(2, dtype=FIELD)
    table["kind"], table["name"] = (2, 1), (b"image", b"label")
    return table


@dataclass(frozen=True, kw_only=True)
class BetonManifest:
    """The manifest of a complete file.

    bytes, images  of the file
    tables_sha256  of header, field table, sample table and allocation table, concatenated
    file_sha256    of the whole file, or "" if it is longer than HASHED_BYTES
    names          N names, relative to the source; undecodable bytes as surrogate escapes
    class_names    of labels 0, 1, ...; empty without labels
    stored         number of images copied unchanged, re-encoded as JPEG, or stored as raw pixels
    settings       of the conversion
    quarantine     (name, reason) of the images left out
    versions       of the programs that wrote it
    """

    format: str = MANIFEST_FORMAT
    dataset: str
    bytes: int
    images: int
    tables_sha256: str
    file_sha256: str
    class_names: list[str]
    names: list[str]
    stored: dict[str, int]
    settings: dict[str, Any]
    quarantine: list[list[str]]
    versions: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> BetonManifest:
        """Raises ValueError with the reason if the text is not a manifest."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"its format is not '{MANIFEST_FORMAT}'")
        kinds = {
            "dataset": str,
            "bytes": int,
            "images": int,
            "tables_sha256": str,
            "file_sha256": str,
            "class_names": list,
            "names": list,
        }
        for field in fields(cls):
            if field.name not in values:
                raise ValueError(f"it has no '{field.name}'")
            if not isinstance(values[field.name], kinds.get(field.name, object)):
                raise ValueError(f"its '{field.name}' is not of type {kinds[field.name].__name__}")
        if unknown := values.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"it has an unknown '{printable(min(unknown))}'")
        if not all(isinstance(name, str) for name in values["names"] + values["class_names"]):
            raise ValueError("a name in it is not text")
        if len(values["names"]) != values["images"]:
            raise ValueError(f"it has {len(values['names']):,} names for {values['images']:,} images")
        return cls(**values)


@dataclass(frozen=True)
class Tables:
    """The tables of a file, checked for consistency.

    samples, lengths  (N,) of SAMPLE, and (N,) int64 bytes of every image
    sha256            of all tables
    """

    samples: np.ndarray
    lengths: np.ndarray
    sha256: str


def manifest_path(path: str) -> str:
    return path + ".json"


def read_index(path: str) -> ImageIndex:
    """The index of a complete `.beton` file, after checks of its tables, hashes and JPEG headers.

    Files of up to `HASHED_BYTES` are hashed completely. In longer ones the tables are hashed, and every JPEG must begin
    with a header of the right size and have its end marker. Raises DataError with one line of what is wrong.
    """
    path = os.path.abspath(path)
    shown = printable(path)
    try:
        with open(path, "rb") as file:
            manifest = _read_manifest(path)
            length = os.fstat(file.fileno()).st_size
            if length != manifest.bytes:
                raise DataError(f"{shown} has {length:,} bytes, but {manifest.bytes:,} in its manifest; {REMEDY}")
            tables = read_tables(file, shown)
            if len(tables.samples) != manifest.images:
                raise DataError(
                    f"{shown} has {len(tables.samples):,} images, but {manifest.images:,} in its manifest; {REMEDY}"
                )
            if tables.sha256 != manifest.tables_sha256:
                raise DataError(
                    f"the tables of {shown} have changed since they were written (SHA-256 differs); {REMEDY}"
                )
            if length <= HASHED_BYTES:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest.file_sha256:
                    raise DataError(f"{shown} has changed since it was written (SHA-256 differs); {REMEDY}")
            labels = _labels(tables.samples["label"], manifest, shown)
            index = _index(path, tables, manifest, labels)
            _check_jpegs(file, index)
    except OSError as error:
        raise DataError(f"cannot read {shown} ({error.strerror or error}); expected a .beton file") from error
    return index


def read_tables(file: IO[bytes], shown: str) -> Tables:
    """The tables of an open file, called `shown` in messages. Sizes are checked before anything is allocated.

    Raises DataError with the value for any that is impossible.
    """

    def bad(reason: str) -> DataError:
        return DataError(f"{shown} is not a usable .beton file: {reason}; {REMEDY}")

    length = os.fstat(file.fileno()).st_size
    if length < SAMPLES_AT:
        raise bad(f"{length:,} bytes are less than its header")
    file.seek(0)
    front = file.read(SAMPLES_AT)
    version, field_count, page_bytes, count, allocations_at = (
        int(value) for value in np.frombuffer(front, HEADER, 1)[0].item()
    )
    if version != VERSION:
        raise bad(f"its version is {version}, expected {VERSION}")
    if field_count != 2 or front[HEADER.itemsize :] != field_table().tobytes():
        raise bad("its fields are not an image and an integer label")
    if page_bytes == 0 or page_bytes & (page_bytes - 1):
        raise bad(f"its pages have {page_bytes:,} bytes, expected a power of two")
    samples_end = SAMPLES_AT + count * SAMPLE.itemsize
    if count == 0 or samples_end > allocations_at or allocations_at + count * ALLOCATION.itemsize != length:
        raise bad(f"its header claims {count:,} images, whose tables do not fit its {length:,} bytes")
    rows = file.read(count * SAMPLE.itemsize)
    file.seek(allocations_at)
    tail = file.read(count * ALLOCATION.itemsize)
    if len(rows) + len(tail) != count * (SAMPLE.itemsize + ALLOCATION.itemsize):
        raise bad("it became shorter while it was read")
    samples, allocations = np.frombuffer(rows, SAMPLE), np.frombuffer(tail, ALLOCATION)

    if (allocations["sample"] != np.arange(count, dtype=np.uint64)).any():
        raise bad("its allocation table does not have one row per image, in order")
    if (allocations["pointer"] != samples["pointer"]).any():
        raise bad("its two tables disagree on where the images begin")
    start, size = allocations["pointer"], allocations["length"]
    outside = (start < samples_end) | (start > allocations_at) | (size == 0) | (size > page_bytes)
    outside |= start + np.minimum(size, page_bytes) > allocations_at  # the minimum keeps the sum below 2⁶⁴
    if outside.any():
        raise bad(f"image {int(outside.argmax())} is not inside its pages")
    area = samples["width"].astype(np.uint64) * samples["height"]
    wrong = (area == 0) | (area > MAX_PIXELS) | (samples["mode"] > RAW)
    wrong |= (samples["mode"] == RAW) & (size != 3 * area)
    if wrong.any():
        i = int(wrong.argmax())
        row = samples[i]
        raise bad(f"image {i} claims {row['width']}×{row['height']} pixels in {size[i]:,} bytes of mode {row['mode']}")
    return Tables(samples, size.astype(np.int64), hashlib.sha256(front + rows + tail).hexdigest())


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


def _read_manifest(path: str) -> BetonManifest:
    manifest = manifest_path(path)
    try:
        with open(manifest, encoding="utf-8") as file:
            return BetonManifest.from_json(file.read())
    except FileNotFoundError as error:
        raise DataError(
            f"{printable(path)} has no manifest {printable(os.path.basename(manifest))}: its conversion did not finish "
            f"or was not by tools/make_ffcv.py; convert again"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{printable(manifest)} is not a usable manifest: {reason}; {REMEDY}") from error


def _labels(labels: np.ndarray, manifest: BetonManifest, shown: str) -> np.ndarray | None:
    classes = len(manifest.class_names)
    if classes == 0 and (labels == NO_LABEL).all():
        return None
    if labels.min() < 0 or labels.max() >= classes:
        bounds = f"labels {labels.min()} to {labels.max()}"
        raise DataError(f"{shown} has {bounds}, but {classes} classes in its manifest; {REMEDY}")
    return labels.astype(np.int64)


def _index(path: str, tables: Tables, manifest: BetonManifest, labels: np.ndarray | None) -> ImageIndex:
    samples = tables.samples
    raw = samples["mode"] == RAW
    files, offsets = np.zeros(len(samples), dtype=np.int32), samples["pointer"].astype(np.int64)
    records = PackedRecords((path,), files, offsets, tables.lengths, raw, tuple(manifest.names))
    sizes = np.stack([samples["height"], samples["width"]], axis=1).astype(np.int32)
    return ImageIndex(manifest.dataset, sizes, labels, tuple(manifest.class_names), records=records)


def _check_jpegs(file: IO[bytes], index: ImageIndex) -> None:
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
            height, width = sizes[i]
            actual = "not a complete JPEG" if size is None else f"a JPEG of {size[1]}×{size[0]} pixels"
            raise DataError(f"{index.display_name(i)} is {actual}, expected {width}×{height}; {REMEDY}")
