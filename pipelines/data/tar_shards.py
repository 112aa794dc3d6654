"""Tar archives of images in WebDataset layout: listed, indexed, and never extracted.

An archive is a sequence of samples, files whose names agree up to the first dot after the last slash: `0042.jpg` is an
image and `0042.cls` its label (`tar_classes`). A link to an image in the same archive is that image; other files are
passed over.

Images are read in place, at their offsets, so archives may be on a slow or a shared disk. This needs uncompressed
archives: compressed members have no offsets.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.data.decode import bad_image, printable
from pipelines.data.decoding import Decoding
from pipelines.data.file_kinds import EXTENSIONS, HEAD_BYTES, begins_like_image, extension, may_be_image
from pipelines.data.files import ImageFiles, holds_image, read_folder
from pipelines.data.formats.bands import BandsError
from pipelines.data.formats.unsupported import describe
from pipelines.data.headers import MAX_THREADS, Header, Headers, Progress, collected, inspect_part
from pipelines.data.index import PackedRecords
from pipelines.data.layout import TESTS, TRAIN, find_splits
from pipelines.data.tar_classes import classes_of
from pipelines.errors import DataError
from pipelines.files import absolute
from pipelines.reads import Timed

MAX_LABEL_BYTES = 256
MAX_ARCHIVES = 10**6
MAX_LINKS = 8  # from one to the next
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(NamedTuple):
    """Absolute paths of the archives, in order: those for pretraining, and those for evaluation, if any."""

    train: tuple[str, ...]
    test: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Members:
    """N images of some archives, before any of them is read.

    files    `paths` is SHARD/MEMBER for messages and order, `classes` the class of each image
    records  their offsets and lengths
    """

    files: ImageFiles
    records: PackedRecords


# ---- which archives --------------------------------------------------------------------------------------------------


def find_shards(data: str) -> Shards | None:
    """The archives of `data`, or None if it is something else.

    data  a `.tar`, a pattern such as `train-{000000..000146}.tar`, or a folder of archives without other images. A
          folder may contain folders named like `train` and `val` (`layout`), or archives with those words in their
          names; then the latter are the test split.

    Raises DataError if an archive of a pattern is missing, or a folder contains both plain and compressed archives.
    """
    path = absolute(data)
    if _RANGE.search(data):
        return Shards(_expand(path))
    if os.path.isfile(path):
        if _is_compressed(path):
            raise _compressed(path)
        return Shards((path,)) if path.endswith(".tar") else None
    if not os.path.isdir(path):
        return None
    train, tests = find_splits(read_folder(path).folders)
    if train is not None and (archives := _archives(train)):
        return Shards(archives, next((found for folder in tests if (found := _archives(folder))), ()))
    here = _archives(path)
    if not here:
        return None
    named = {word: tuple(p for p in here if word in os.path.basename(p).lower()) for word in (TRAIN[0], *TESTS)}
    if not named[TRAIN[0]]:
        return Shards(here)
    return Shards(named[TRAIN[0]], next((named[word] for word in TESTS if named[word]), ()))


def _archives(folder: str) -> tuple[str, ...]:
    """The archives in a folder; none if there are images outside of them, which are the data then."""
    with os.scandir(folder) as entries:
        names = sorted((entry.name for entry in entries if not entry.name.startswith(".")), key=os.fsencode)
    archives = tuple(os.path.join(folder, name) for name in names if name.endswith(".tar"))
    if not archives or holds_image(folder):
        return ()
    compressed = [name for name in names if _is_compressed(name)]
    if compressed:
        raise _compressed(os.path.join(folder, compressed[0]))
    return archives


def _expand(pattern: str) -> tuple[str, ...]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar, all of which must exist."""
    match = _RANGE.search(pattern)
    if match is None:
        if not os.path.isfile(pattern):
            raise DataError(f"the archive {printable(pattern)} does not exist; expected every archive of the pattern")
        return (pattern,)
    first, last = (int(number) for number in match.groups())
    if last < first or last - first >= MAX_ARCHIVES:
        raise DataError(f"{printable(match.group())} is not a valid range; expected one such as {{000..146}}")
    width = len(match[1])
    before, after = pattern[: match.start()], pattern[match.end() :]
    return tuple(path for number in range(first, last + 1) for path in _expand(f"{before}{number:0{width}d}{after}"))


def _is_compressed(name: str) -> bool:
    return name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"))


def _compressed(path: str) -> DataError:
    return DataError(
        f"{printable(path)} is compressed, and images are read in place from archives: decompress it, or repack it "
        f"with `python tools/make_shards.py`"
    )


# ---- their contents --------------------------------------------------------------------------------------------------


def list_members(archives: Sequence[str]) -> Members:
    """Every image of the archives, in their order. Raises DataError for an archive that is damaged or holds none."""
    with ThreadPoolExecutor(min(MAX_THREADS, len(archives))) as pool:
        contents = list(pool.map(_list_archive, archives))
    images = [(file, image) for file, (images, _) in enumerate(contents) for image in images]
    others: Counter[str] = Counter()
    for _, passed_over in contents:
        others.update(passed_over)
    if not images:
        raise DataError(
            f"{printable(archives[0])} {f'and {len(archives) - 1:,} more hold' if len(archives) > 1 else 'holds'} no "
            f"images; expected members that end in {', '.join(EXTENSIONS)}"
        )
    records = PackedRecords(
        tuple(archives),
        np.array([file for file, _ in images], dtype=np.int32),
        np.array([image.offset for _, image in images], dtype=np.int64),
        np.array([image.length for _, image in images], dtype=np.int64),
        np.zeros(len(images), dtype=bool),
        tuple(image.name for _, image in images),
    )
    paths = tuple(f"{archives[file]}/{image.name}" for file, image in images)
    classes, why = classes_of([(image.name, image.label) for _, image in images])
    return Members(ImageFiles(paths, classes, why, others), records)


def inspect_members(
    records: PackedRecords, decoding: Decoding, progress: Progress = lambda done, total: None
) -> Headers:
    """The headers of all images, those of bad ones with a reason.

    progress  called with the number of archives read so far, and of all
    """
    headers: list[Header | None] = [None] * len(records.names)
    bands: list[tuple[int, int]] = []

    def of_archive(file: int) -> list[tuple[int, str]]:
        reasons, path = [], records.paths[file]
        with open(path, "rb", buffering=0) as archive:
            for i in np.flatnonzero(records.files == file).tolist():
                name = f"{records.names[i]} in {path}"
                try:
                    offset, length = int(records.offsets[i]), int(records.lengths[i])
                    with Timed(name):
                        headers[i] = inspect_part(archive.fileno(), offset, length, name, decoding)
                except OSError as error:
                    reasons.append((i, str(bad_image(name, ValueError(error.strerror or str(error))))))
                except DataError as error:
                    reasons.append((i, str(error)))
                    if isinstance(error.__cause__, BandsError):
                        bands.append((i, error.__cause__.found))
        return reasons

    bad: list[tuple[int, str]] = []
    with ThreadPoolExecutor(min(MAX_THREADS, len(records.paths))) as pool:
        for done, reasons in enumerate(pool.map(of_archive, range(len(records.paths))), start=1):
            bad += reasons
            progress(done, len(records.paths))
    return collected(headers, sorted(bad), bands)


class _Image(NamedTuple):
    name: str
    offset: int
    length: int
    label: str | None


def _list_archive(path: str) -> tuple[list[_Image], Counter[str]]:
    """The images of an archive in order, and the number of other members by extension. Reads headers only."""
    found: list[tuple[str, tarfile.TarInfo]] = []  # images and links
    labels: dict[str, str] = {}
    others: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in _members(archive, path):
                folder, name = posixpath.split(member.name)
                stem, _, ending = name.partition(".")
                if member.isdir() or not stem:
                    continue
                if ending == "cls" and member.isreg() and member.size <= MAX_LABEL_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    labels[f"{folder}/{stem}"] = file.read().decode("utf-8", "surrogateescape").strip()
                elif member.islnk() or member.issym() or (_is_plain(member) and _is_image(archive, member, path)):
                    found.append((f"{folder}/{stem}", member))
                else:
                    others[extension(name) if _is_plain(member) else "devices or sparse files"] += 1
            complete = _ends_with_zeros(path)
    except (OSError, tarfile.TarError, ValueError) as error:
        if (kind := _other_kind(path)) is not None:
            raise DataError(
                f"{printable(path)} is no tar archive that images can be read from in place: {kind}"
            ) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{printable(path)} is not a readable tar archive ({printable(reason)}); copy it again"
        ) from error
    if not complete:
        raise DataError(f"{printable(path)} has no end-of-archive marker: it is truncated; copy it again")
    images = []
    by_name = {posixpath.normpath(member.name): member for _, member in found}
    for key, member in found:
        target = _target(member, by_name)
        if target is None:
            others["links elsewhere"] += 1
        else:
            images.append(_Image(member.name, target.offset_data, target.size, labels.get(key) or None))
    return images, others


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _is_image(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bool:
    by_name = may_be_image(posixpath.basename(member.name))
    if by_name is not None:
        return by_name
    assert archive.fileobj is not None
    with Timed(path):
        archive.fileobj.seek(member.offset_data)
        return begins_like_image(archive.fileobj.read(min(HEAD_BYTES, member.size)))


def _target(member: tarfile.TarInfo, images: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The image that a member is or links to; None if that is no image of the archive."""
    for _ in range(MAX_LINKS):
        if not (member.islnk() or member.issym()):
            return member
        folder = posixpath.dirname(member.name) if member.issym() else ""
        found = images.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
        if found is None:
            return None
        member = found
    return None


def _members(archive: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    while True:
        with Timed(path):  # one header at a time: an archive of many images may take longer than a read
            member = archive.next()
        if member is None:
            return
        yield member


def _ends_with_zeros(path: str) -> bool:
    """Whether the file ends with the two zero blocks that end an archive."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2 * tarfile.BLOCKSIZE))
        return file.read() == bytes(2 * tarfile.BLOCKSIZE)


def _other_kind(path: str) -> str | None:
    """What a file is that is no tar archive, such as one compressed with gzip, and the remedy; None if unknown."""
    try:
        with Timed(path), open(path, "rb") as file:
            start = file.read(257)  # up to the mark of a tar archive
    except OSError:
        return None
    return describe(start) if start.strip(b"\0") else None
