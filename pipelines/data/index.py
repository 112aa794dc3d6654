"""What a data set is to every backend: N upright images, their sizes, their labels, and where their bytes are.

N images · H, W height and width in pixels of the whole, upright image
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelines.data.decode import decode, printable
from pipelines.data.quarantine import LEFT_OUT, REPLACED, Entry, Ledger, grey
from pipelines.errors import DataError


@dataclass(frozen=True, eq=False)
class PackedRecords:
    """Where N images lie inside of larger files.

    paths    the files, absolute
    files    (N,) int32, which of them holds each image
    offsets  (N,) int64, first byte of every image
    lengths  (N,) int64, its bytes
    raw      (N,) bool, H·W·3 bytes of RGB rather than an encoded image
    names    what the images are called, for messages
    """

    paths: tuple[str, ...]
    files: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    raw: np.ndarray
    names: tuple[str, ...]

    @property
    def in_beton(self) -> bool:
        """Whether they are one `.beton` file, rather than tar archives."""
        return self.paths[0].endswith(".beton")

    def select(self, positions: np.ndarray) -> PackedRecords:
        """Of the files only those that are needed are kept, so that a small selection is small."""
        used, files = np.unique(self.files[positions], return_inverse=True)
        return PackedRecords(
            tuple(self.paths[i] for i in used.tolist()),
            files.astype(np.int32),
            self.offsets[positions],
            self.lengths[positions],
            self.raw[positions],
            tuple(self.names[i] for i in positions.tolist()),
        )

    def path(self, i: int) -> str:
        """The file that holds image i."""
        return self.paths[self.files[i]]

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError, also where the file ends before them."""
        with open(self.path(i), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), int(self.lengths[i]), int(self.offsets[i]))
        if len(data) != self.lengths[i]:
            raise OSError("the file ends before it")
        return data


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """N images: files (`paths`), parts of files (`records`) or an array in memory (`pixels`), one of the three.

    name         what people call it, in tables and logs
    sizes        (N, 2) int32, height and width after EXIF orientation
    labels       (N,) int64, or None when nothing is known about the images
    class_names  names of the labels 0, 1, ...; empty without labels
    paths        N absolute paths; undecodable bytes of a name are kept as surrogate escapes, so that `open` finds them
    pixels       (N, H, W, 3) uint8 RGB
    records      where in a `.beton` file or in tar archives they lie
    ledger       where an image that has become bad is written down and replaced by a grey one; None to make it an error
    """

    name: str
    sizes: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
    pixels: np.ndarray | None = None
    records: PackedRecords | None = None
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        places = [
            place for place in (self.paths, self.pixels, self.records and self.records.offsets) if place is not None
        ]
        assert len(places) == 1, "images are files, parts of files, or an array"
        count = len(places[0])
        assert self.sizes.shape == (count, 2)
        assert self.sizes.dtype == np.int32
        assert self.pixels is None or (self.pixels.dtype == np.uint8 and self.pixels.shape[3:] == (3,))
        assert self.labels is None or (self.labels.shape == (count,) and self.labels.dtype == np.int64)

    @classmethod
    def from_pixels(
        cls, name: str, pixels: np.ndarray, labels: np.ndarray | None = None, class_names: tuple[str, ...] = ()
    ) -> ImageIndex:
        """An index of images already in memory: pixels (N, H, W, 3) uint8, labels (N,) of any integer type."""
        sizes = np.full((len(pixels), 2), pixels.shape[1:3], dtype=np.int32)
        labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        return cls(name, sizes, labels, class_names, pixels=pixels)

    def __len__(self) -> int:
        return len(self.sizes)

    def is_encoded(self, i: int) -> bool:
        """Whether image i is the bytes of an image file, rather than pixels in memory or in a `.beton`."""
        return self.pixels is None and not (self.records is not None and self.records.raw[i])

    def read(self, i: int, reduction: int = 1) -> np.ndarray:
        """Image i, upright: (H, W, 3) uint8 RGB. Raises DataError where the file is unreadable, bad or has changed.

        With a reduction, (⌈H/r⌉, ⌈W/r⌉, 3) where `decode` can.
        With a ledger such an image is replaced, and DataError means that they have become too many.
        """
        if self.pixels is not None:
            return self.pixels[i]
        try:
            return self._read(i, reduction)
        except DataError as error:
            if self.ledger is None:
                raise
            self.ledger.note(Entry(self.display_name(i), str(error), REPLACED))
            return grey(*self.sizes[i].tolist())

    def _read(self, i: int, reduction: int) -> np.ndarray:
        height, width = (int(side) for side in self.sizes[i])
        if not self.is_encoded(i):
            return np.frombuffer(bytearray(self._bytes(i)), dtype=np.uint8).reshape(height, width, 3)
        image = decode(self._bytes(i), self.display_name(i), reduction)
        if image.shape[:2] not in ((height, width), (-(-height // reduction), -(-width // reduction))):
            raise DataError(
                f"{self.display_name(i)} is {image.shape[1]}×{image.shape[0]} pixels and was {width}×{height} when the "
                f"data set was indexed; start again, and leave the files alone while training"
            )
        return image

    def read_bytes(self, i: int) -> bytes:
        """The encoded bytes of image i. Raises DataError where it is unreadable, or kept as pixels in a `.beton`."""
        if not self.is_encoded(i):
            raise DataError(
                f"{self.display_name(i)} is kept as raw pixels, and this pipeline takes encoded images only: use "
                f"--pipeline ffcv, torch or resident, or convert with --mode jpg --quality 95"
            )
        return self._bytes(i)

    def _bytes(self, i: int) -> bytes:
        assert self.pixels is None, "images in memory have no encoded bytes"
        try:
            if self.records is not None:
                return self.records.read(i)
            assert self.paths is not None
            return Path(self.paths[i]).read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"cannot read {self.display_name(i)} ({reason}); check that the file is still there and readable"
            ) from error

    def path(self, i: int) -> str:
        """Where image i is: its path, or its name and the file that holds it."""
        if self.records is not None:
            return f"{self.records.names[i]} in {self.records.path(i)}"
        return self.paths[i] if self.paths is not None else f"image {i} of {self.name}"

    def display_name(self, i: int) -> str:
        """How messages name image i: its path with control, bidi and undecodable characters escaped."""
        return printable(self.path(i))

    def select(self, positions: np.ndarray) -> ImageIndex:
        """The images at `positions` (M,) integers, in that order; pixels are copied, class names stay whole."""
        positions = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            sizes=self.sizes[positions],
            labels=None if self.labels is None else self.labels[positions],
            paths=None if self.paths is None else tuple(self.paths[i] for i in positions.tolist()),
            pixels=None if self.pixels is None else self.pixels[positions],
            records=None if self.records is None else self.records.select(positions),
        )

    @cached_property
    def uniform_size(self) -> tuple[int, int] | None:
        """(height, width) if all images share it, else None."""
        if len(self) == 0 or (self.sizes != self.sizes[0]).any():
            return None
        return int(self.sizes[0, 0]), int(self.sizes[0, 1])

    def describe(self) -> str:
        """One line for people: `cifar10: 50,000 images of 32×32 (width×height), 10 classes, in memory`."""
        if self.uniform_size is not None:
            sides = f"of {self.uniform_size[1]}×{self.uniform_size[0]}"
        elif len(self):
            (low_h, low_w), (high_h, high_w) = self.sizes.min(axis=0), self.sizes.max(axis=0)
            sides = f"of {low_w}–{high_w}×{low_h}–{high_h}"
        else:
            sides = "of no size"
        classes = "no labels" if self.labels is None else f"{len(self.class_names)} classes"
        return f"{printable(self.name)}: {len(self):,} images {sides} (width×height), {classes}, {self._place()}"

    def _place(self) -> str:
        if self.records is None:
            return "in memory" if self.pixels is not None else "in files"
        if self.records.in_beton:
            return "in a .beton file"
        return f"in {len(self.records.paths):,} tar archives" if len(self.records.paths) > 1 else "in a tar archive"


@dataclass(frozen=True, eq=False)
class Dataset:
    """The images to pretrain on and, where there are any, the images to evaluate with.

    train       what pretraining sees
    test        what is classified in an evaluation, or None
    bank        the labelled images an evaluation compares `test` with or fits on: `train` itself if it has labels,
                another part of the data set if that has (STL-10), else None
    quarantine  (path, reason) of every bad file left out; empty unless `bad_images="quarantine"` was requested
    skipped     how many files were passed over because their names are not those of images
    indexing    how the sizes became known, in words, where a scan helped
    """

    train: ImageIndex
    test: ImageIndex | None = None
    bank: ImageIndex | None = None
    quarantine: tuple[tuple[str, str], ...] = ()
    skipped: int = 0
    indexing: str = ""

    def __post_init__(self) -> None:
        if self.bank is None and self.train.labels is not None:
            object.__setattr__(self, "bank", self.train)

    def with_ledger(self, ledger: Ledger) -> Dataset:
        """The same, with bad images written down: those that were left out now, others when they are met and replaced.

        Raises DataError where they are too many.
        """
        for path, reason in self.quarantine:
            ledger.note(Entry(printable(path), reason, LEFT_OUT))
        train = replace(self.train, ledger=ledger)
        test = None if self.test is None else replace(self.test, ledger=ledger)
        bank = None if self.bank is None else replace(self.bank, ledger=ledger)
        return replace(self, train=train, test=test, bank=train if self.bank is self.train else bank)
