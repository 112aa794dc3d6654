"""What the images of a run contain, so that a resumed run notices images that were replaced under the same names.

`data.npz` in the folder of a run holds the size and time of every file and the hash of some, and each checkpoint holds
one hash of these sizes and contents. A file with the same size and time is the same file. A data set that was copied
has new times for all files, and then the hashes decide. New times for some of the files mean that these were replaced,
unless their hashes are known and the same. Not noticed: a replacement of the same size and time outside the sample;
and, in a data set that was copied and not scanned, one of the same size outside the sample.

F files, N images in them: F = N, or F archives · M = min(N, SAMPLE) images whose content is hashed
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.dataset import limit_positions
from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.data.manifest import file_stats
from pipelines.errors import DataError
from pipelines.files import replacing

FILE_NAME = "data.npz"
SAMPLE = 256  # evenly spaced; reading them takes a second on a network disk, 20 ms on a local one
WHOLE_BYTES = 2**20  # of a longer image, the first and last half of this are hashed
MAX_HASHED = 1_000  # files whose time is new and whose hash is known are hashed again, unless there are more
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class DataRecord:
    """The content of a data set at one time.

    stats    (F, 2) int64, bytes and modification time in ns; -1 for a missing file
    sampled  (M, 16) uint8, hashes of the sample; zero for an image that cannot be read
    scanned  (N, 16) uint8, BLAKE2b of each file that `fastmoco scan` read, else zero; (0, 16) without a scan
    """

    stats: np.ndarray
    sampled: np.ndarray
    scanned: np.ndarray

    @property
    def content(self) -> str:
        """16 hexadecimal digits that do not change when a data set is copied."""
        return hashlib.sha256(self.stats[:, 0].tobytes() + self.sampled.tobytes()).hexdigest()[:16]


class Difference(NamedTuple):
    """How images differ from those of a record: an error unless it is allowed, or a note about what was not compared.

    Both are parts of a sentence, empty if there is nothing to say.
    """

    error: str = ""
    note: str = ""


def take(images: ImageIndex) -> DataRecord | None:
    """The record of images as they are now; None if they are in memory, where `fingerprint` hashes all of them."""
    if images.pixels is not None:
        return None
    digests = [_hash(images, int(i)) for i in _sample(images)]
    scanned = np.zeros((0, DIGEST_BYTES), dtype=np.uint8) if images.scanned is None else images.scanned
    return DataRecord(file_stats(_files(images)), _rows(digests), scanned)


def difference(before: DataRecord | None, content: str | None, now: DataRecord, images: ImageIndex) -> Difference:
    """How `images`, whose record is `now`, differ from those of a checkpoint.

    before   the record of the run, or None if there is none that can be read
    content  `DataRecord.content` of the checkpoint, or None if it is older than records
    """
    files = _files(images)
    if before is None:
        if content not in (None, now.content):
            return Difference(f"the sizes or contents of the {len(files):,} files are not those of the checkpoint")
        return Difference(note="" if content is None else f"{FILE_NAME} is missing or damaged: {_sampled(now)}")
    if len(before.stats) != len(now.stats):
        return Difference(f"they are in {len(now.stats):,} files and were in {len(before.stats):,}")
    if len(other := np.flatnonzero(before.stats[:, 0] != now.stats[:, 0])):
        i = int(other[0])
        sizes = f"has {now.stats[i, 0]:,} bytes and had {before.stats[i, 0]:,}"
        return Difference(f"{printable(files[i])} {sizes}{_and_more(len(other), len(files))}")
    if error := _other_content(before, now, images):
        return Difference(error)
    if content not in (None, now.content):
        return Difference("the checkpoint is from before the images were changed")
    return _other_times(before, now, images)


def write(record: DataRecord, path: Path) -> None:
    """Replaces or creates the file of a record. Raises OSError."""
    columns = {"stats": record.stats, "sampled": record.sampled, "scanned": record.scanned}
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **columns)


def read(path: Path) -> DataRecord | None:
    """The record in a file; None if there is none, or if it is damaged. Executes nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return None  # its size would not be bounded
        with np.load(path, allow_pickle=False) as columns:
            record = DataRecord(columns["stats"], columns["sampled"], columns["scanned"])
    except Exception:  # untrusted bytes: readers of zip and npy may raise anything
        return None
    shapes = (record.stats.shape[1:], record.sampled.shape[1:], record.scanned.shape[1:])
    kinds = (record.stats.dtype, record.sampled.dtype, record.scanned.dtype)
    valid = shapes == ((2,), (DIGEST_BYTES,), (DIGEST_BYTES,)) and kinds == (np.int64, np.uint8, np.uint8)
    return record if valid else None


def _other_content(before: DataRecord, now: DataRecord, images: ImageIndex) -> str:
    """The images whose content is known to differ, from the sample and from scans."""
    if len(before.sampled) == len(now.sampled):
        other = np.flatnonzero((before.sampled != now.sampled).any(axis=1))
        if len(other):
            name = images.display_name(int(_sample(images)[other[0]]))
            return f"{name} has another content{_and_more(len(other), len(now.sampled), 'compared images')}"
    if len(before.scanned) != len(now.scanned):
        return ""  # one of the two is of no scan
    other = np.flatnonzero(_both_known(before.scanned, now.scanned) & (before.scanned != now.scanned).any(axis=1))
    if len(other):
        name = images.display_name(int(other[0]))
        return f"{name} has another content than when it was scanned{_and_more(len(other), len(images))}"
    return ""


def _other_times(before: DataRecord, now: DataRecord, images: ImageIndex) -> Difference:
    """What new times mean, for files whose sizes and known contents are the same."""
    files, new = _files(images), before.stats[:, 1] != now.stats[:, 1]
    count = int(new.sum())
    if count == 0:
        return Difference()
    if images.records is None:
        new[_sample(images)] = False  # compared by content
        if len(before.scanned) == len(new):
            new &= ~_both_known(before.scanned, now.scanned)
            again = np.flatnonzero(new & before.scanned.any(axis=1))
            for i in (again if len(again) <= MAX_HASHED else again[:0]).tolist():
                if _hash(images, i, whole=True) != before.scanned[i].tobytes():
                    return Difference(f"{images.display_name(i)} has another content than when it was scanned")
                new[i] = False
    unknown = np.flatnonzero(new)
    if len(unknown) and count < len(files):
        name = printable(files[int(unknown[0])])
        return Difference(f"{name} has another modification time{_and_more(len(unknown), len(files))}")
    times = f"{count:,} of {len(files):,} files have new modification times"
    return Difference(note=f"{times}: {_sampled(now) if len(unknown) else 'their contents are the same'}")


def _sampled(now: DataRecord) -> str:
    count = len(now.sampled)
    return f"only the sizes of all files and the contents of {count:,} images were compared, which are the same"


def _both_known(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) bool: the rows of two arrays (N, 16) that are hashes; all False if one is of no scan."""
    if len(a) != len(b):
        return np.zeros(len(b), dtype=bool)
    return np.asarray(a.any(axis=1) & b.any(axis=1))


def _and_more(count: int, total: int, of: str = "files") -> str:
    return f", and {count - 1:,} more of {total:,} {of}" if count > 1 else f" (one of {total:,} {of})"


def _files(images: ImageIndex) -> tuple[str, ...]:
    if images.records is not None:
        return images.records.paths
    assert images.paths is not None
    return images.paths


def _sample(images: ImageIndex) -> np.ndarray:
    return limit_positions(len(images), None, SAMPLE)


def _rows(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _hash(images: ImageIndex, i: int, *, whole: bool = False) -> bytes:
    """BLAKE2b of the stored bytes of image i, or of the ends of many; zeros if it cannot be read."""
    try:
        data = images.stored_bytes(i)
    except DataError:  # it is reported when it is trained on
        return bytes(DIGEST_BYTES)
    if not whole and len(data) > WHOLE_BYTES:
        data = data[: WHOLE_BYTES // 2] + data[-WHOLE_BYTES // 2 :]
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
