"""The index of a data set: N upright images, their sizes and labels, and where their bytes are stored.

N images · H, W height and width in pixels of the upright image · C channels
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from pipelines.data.choices import Choices
from pipelines.data.decode import decode, printable
from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.formats.deep import Span
from pipelines.data.quarantine import LEFT_OUT, REPLACED, Entry, Ledger, grey
from pipelines.data.record_digests import RecordDigests
from pipelines.errors import DataError
from pipelines.reads import read_file, read_part

STORED = ("in memory", "in files", "in tar archives", "in a .beton file")


@dataclass(frozen=True, eq=False)
class PackedRecords:
    """The positions of N images inside larger files.

    paths    the files, absolute
    files    (N,) int32, position in `paths` of the file of each image
    offsets  (N,) int64, first byte of each image
    lengths  (N,) int64, its number of bytes
    raw      (N,) bool, H·W·3 bytes of RGB rather than an encoded image
    names    of the images, for messages
    digests  of their bytes, where they were recorded
    """

    paths: tuple[str, ...]
    files: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    raw: np.ndarray
    names: tuple[str, ...]
    digests: RecordDigests | None = None

    @property
    def in_beton(self) -> bool:
        """Whether they are one `.beton` file, rather than tar archives."""
        return self.paths[0].endswith(".beton")

    def select(self, positions: np.ndarray) -> PackedRecords:
        """The records at `positions`, with only the paths they need, so that a small selection is small."""
        used, files = np.unique(self.files[positions], return_inverse=True)
        return PackedRecords(
            tuple(self.paths[i] for i in used.tolist()),
            files.astype(np.int32),
            self.offsets[positions],
            self.lengths[positions],
            self.raw[positions],
            tuple(self.names[i] for i in positions.tolist()),
            None if self.digests is None else self.digests.select(positions),
        )

    def path(self, i: int) -> str:
        """The file that contains image i."""
        return self.paths[self.files[i]]

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises DataError if they are not those recorded, OSError if the file is too short."""
        data = read_part(self.path(i), int(self.offsets[i]), int(self.lengths[i]))
        if self.digests is not None and not self.digests.is_intact(i, data):
            raise self.damaged(i)
        return data

    def damaged(self, i: int) -> DataError:
        """The error for an image whose bytes are not those recorded."""
        start, length = int(self.offsets[i]), int(self.lengths[i])
        return DataError(
            f"{printable(self.names[i])} in {printable(self.path(i))} has changed since it was written (SHA-256 of "
            f"bytes {start:,} to {start + length - 1:,} differs): copy the file again, or convert again"
        )


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """N images: files (`paths`), parts of files (`records`) or an array in memory (`pixels`), one of the three.

    name         display name, for tables and logs
    sizes        (N, 2) int32, height and width after EXIF orientation
    labels       (N,) int64, or None without labels
    class_names  names of the labels 0, 1, ...; empty without labels
    paths        N absolute paths; undecodable bytes of a name are surrogate escapes, so that `open` works
    pixels       (N, H, W, C) uint8
    records      positions in a `.beton` file or in tar archives
    scanned      (N, 16) uint8, BLAKE2b of files as `fastmoco scan` read them, zero if changed since; None without
    ledger       records images that have become bad, which are then replaced by grey; None: a bad image is an error
    decoding     how encoded images become pixels
    labelled     number of these images that have a label in the bank of their data set, where not all have
    """

    name: str
    sizes: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
    pixels: np.ndarray | None = None
    records: PackedRecords | None = None
    scanned: np.ndarray | None = None
    ledger: Ledger | None = None
    decoding: Decoding = DEFAULT
    labelled: int = 0

    def __post_init__(self) -> None:
        given = [x for x in (self.paths, self.pixels, self.records and self.records.offsets) if x is not None]
        assert len(given) == 1, "images are files, parts of files, or an array"
        count = len(given[0])
        assert self.sizes.shape == (count, 2)
        assert self.sizes.dtype == np.int32
        assert self.pixels is None or (self.pixels.dtype == np.uint8 and self.pixels.ndim == 4)
        assert self.labels is None or (self.labels.shape == (count,) and self.labels.dtype == np.int64)

    @classmethod
    def from_pixels(
        cls, name: str, pixels: np.ndarray, labels: np.ndarray | None = None, class_names: tuple[str, ...] = ()
    ) -> ImageIndex:
        """An index of images already in memory: pixels (N, H, W, C) uint8, labels (N,) of any integer type."""
        sizes = np.full((len(pixels), 2), pixels.shape[1:3], dtype=np.int32)
        labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        return cls(name, sizes, labels, class_names, pixels=pixels)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def channels(self) -> int:
        """C of every image: 3 unless others were asked for."""
        return self.decoding.channels if self.pixels is None else self.pixels.shape[3]

    def is_encoded(self, i: int) -> bool:
        """Whether image i is an encoded file, rather than pixels in memory or in a `.beton`."""
        return self.pixels is None and not (self.records is not None and self.records.raw[i])

    def read(self, i: int) -> np.ndarray:
        """Image i, upright: (H, W, C) uint8.

        Raises DataError if the file is unreadable, bad or has changed. With a ledger, such an image is recorded and
        replaced by grey, and DataError is raised only if there are too many.
        """
        if self.pixels is not None:
            return self.pixels[i]
        try:
            return self._read(i)
        except DataError as error:
            if self.ledger is None:
                raise
            self.ledger.note(Entry(self.display_name(i), str(error), REPLACED))
            return grey(int(self.sizes[i, 0]), int(self.sizes[i, 1]), self.channels)

    def _read(self, i: int) -> np.ndarray:
        height, width = (int(side) for side in self.sizes[i])
        if not self.is_encoded(i):
            return np.frombuffer(bytearray(self.stored_bytes(i)), dtype=np.uint8).reshape(height, width, 3)
        image = decode(self.stored_bytes(i), self.display_name(i), self.decoding)
        if image.shape[:2] != (height, width):
            raise DataError(
                f"{self.display_name(i)} is {image.shape[1]}×{image.shape[0]} pixels and was {width}×{height} when the "
                f"data set was indexed; restart, and do not change the files while training"
            )
        return image

    def read_bytes(self, i: int) -> bytes:
        """The encoded bytes of image i. Raises DataError if it is unreadable, or stored as pixels in a `.beton`."""
        if not self.is_encoded(i):
            raise DataError(
                f"{self.display_name(i)} is stored as raw pixels, and this pipeline needs encoded images: use "
                f"--pipeline ffcv, torch or resident, or convert with --mode jpg --quality 95"
            )
        return self.stored_bytes(i)

    def stored_bytes(self, i: int) -> bytes:
        """The bytes of image i as they are stored, encoded or not. Raises DataError if it is unreadable."""
        assert self.pixels is None, "images in memory have no encoded bytes"
        try:
            if self.records is not None:
                return self.records.read(i)
            assert self.paths is not None
            return read_file(self.paths[i])
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"cannot read {self.display_name(i)} ({reason}); check that the file is still there and readable"
            ) from error

    def path(self, i: int) -> str:
        """The path of image i, or its name and the file that contains it."""
        if self.records is not None:
            return f"{self.records.names[i]} in {self.records.path(i)}"
        return self.paths[i] if self.paths is not None else f"image {i} of {self.name}"

    def display_name(self, i: int) -> str:
        """Image i in messages: its path with control, bidi and undecodable characters escaped."""
        return printable(self.path(i))

    def select(self, positions: np.ndarray) -> ImageIndex:
        """The images at `positions` (M,) integers, in that order; copies pixels, keeps all class names."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            sizes=self.sizes[positions],
            labels=None if self.labels is None else self.labels[positions],
            paths=None if self.paths is None else tuple(self.paths[i] for i in positions.tolist()),
            pixels=None if self.pixels is None else self.pixels[positions],
            records=None if self.records is None else self.records.select(positions),
            scanned=None if self.scanned is None else self.scanned[positions],
            labelled=0,
        )

    def unlabelled(self, labelled: int = 0) -> ImageIndex:
        """The same images without labels, which so many of them have elsewhere."""
        return replace(self, labels=None, class_names=(), labelled=labelled)

    @cached_property
    def uniform_size(self) -> tuple[int, int] | None:
        """(height, width) if all images have the same size, else None."""
        if len(self) == 0 or (self.sizes != self.sizes[0]).any():
            return None
        return int(self.sizes[0, 0]), int(self.sizes[0, 1])

    def describe(self) -> str:
        """One-line summary: `cifar10: 50,000 images of 32×32 (width×height), 10 classes, in memory`."""
        if self.uniform_size is not None:
            sides = f"of {self.uniform_size[1]}×{self.uniform_size[0]}"
        elif len(self):
            (low_h, low_w), (high_h, high_w) = self.sizes.min(axis=0), self.sizes.max(axis=0)
            sides = f"of {low_w}–{high_w}×{low_h}–{high_h}"
        else:
            sides = "of no size"
        if self.labels is None:
            classes = f"labels for {self.labelled:,} of them" if self.labelled else "no labels"
        else:
            classes = f"{len(self.class_names)} classes"
        return f"{printable(self.name)}: {len(self):,} images {sides} (width×height), {classes}, {self._storage()}"

    @property
    def stored(self) -> str:
        """How the images are stored, one of `STORED`."""
        if self.records is None:
            return "in memory" if self.pixels is not None else "in files"
        return "in a .beton file" if self.records.in_beton else "in tar archives"

    def _storage(self) -> str:
        if self.records is None or self.records.in_beton:
            return self.stored
        return f"in {len(self.records.paths):,} tar archives" if len(self.records.paths) > 1 else "in a tar archive"


@dataclass(frozen=True, eq=False)
class Dataset:
    """The images for pretraining and, if any, for evaluation.

    train       images for pretraining
    test        images that an evaluation classifies, or None
    bank        labelled images that an evaluation compares `test` with or fits on: `train` itself if it has labels,
                otherwise another split (STL-10) or those of its images that have, else None
    quarantine  (path, reason) of every bad file left out; empty unless `bad_images="quarantine"`
    choices     what was taken as data, as labels and as the test split, and why
    indexing    text that describes the source of the image sizes, if there is a scan
    tolerated   (path, fault) of images with faults beside their pixels, or truncated ones that are accepted
    span        the values of the training images of more than 8 bits, or of some of them; None without
    """

    train: ImageIndex
    test: ImageIndex | None = None
    bank: ImageIndex | None = None
    quarantine: tuple[tuple[str, str], ...] = ()
    choices: Choices = field(default_factory=Choices)
    indexing: str = ""
    tolerated: tuple[tuple[str, str], ...] = ()
    span: Span | None = None

    def __post_init__(self) -> None:
        if self.bank is None and self.train.labels is not None:
            object.__setattr__(self, "bank", self.train)

    @property
    def skipped(self) -> int:
        """Number of files that are no images."""
        return sum(self.choices.others.values())

    def with_ledger(self, ledger: Ledger) -> Dataset:
        """The same data set with bad images recorded: those left out now, others when they are read and replaced.

        Raises DataError if there are too many.
        """
        for path, reason in self.quarantine:
            ledger.note(Entry(printable(path), reason, LEFT_OUT))
        train = replace(self.train, ledger=ledger)
        test = None if self.test is None else replace(self.test, ledger=ledger)
        bank = None if self.bank is None else replace(self.bank, ledger=ledger)
        return replace(self, train=train, test=test, bank=train if self.bank is self.train else bank)
