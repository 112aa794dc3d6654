"""The result of a scan, stored next to the images, so that training starts without opening them again.

The file is an uncompressed `.npz` of flat columns: nothing in it is executed, checksums protect it, and a million files
load in about two seconds. An entry is valid while its file has the same size and modification time. Names in it are
only compared with the names of existing files, and never opened.

N files
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.decode import printable
from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.formats.deep import Span, joined
from pipelines.data.headers import FILES_PER_TASK, MAX_THREADS, Headers, Progress, inspect_headers
from pipelines.errors import DataError
from pipelines.files import replacing
from pipelines.reads import Timed

FORMAT = 2  # increment when `decode` changes its result for any file, or when the columns change
FILE_NAME = ".fastmoco-manifest.npz"  # hidden, so that it is not listed with the images

Bad = list[tuple[int, str]]


@dataclass(frozen=True, eq=False)
class ScanManifest:
    """N scanned files.

    paths      absolute; undecodable bytes as surrogate escapes
    stats      (N, 2) int64, bytes and modification time in ns; -1 for a missing file
    sizes      (N, 2) int32, height and width upright; 0×0 for a bad file
    kinds      (N,) uint8, positions in `kind_names` (format and mode, as in `JPEG RGB`); that of a bad file is empty
    digests    (N, 16) uint8, BLAKE2b of the content; zero if it could not be read
    training   (N,) bool, the files of the training split
    histogram  (C, 256) int64, number of occurrences of each value in each channel of the training images
    bad        (position, reason) of every bad file
    tolerated  (position, fault) of the images with faults beside their pixels, or of truncated ones that were accepted
    spans      (position, values) of the images of more than 8 bits, and of those that are bad because of them
    bands      (position, bands) of the files that are bad because these are not the channels that were asked for
    decoding   how encoded images became pixels
    """

    paths: tuple[str, ...]
    stats: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    kind_names: tuple[str, ...]
    digests: np.ndarray
    training: np.ndarray
    histogram: np.ndarray
    bad: tuple[tuple[int, str], ...] = ()
    tolerated: tuple[tuple[int, str], ...] = ()
    spans: tuple[tuple[int, Span], ...] = ()
    bands: tuple[tuple[int, int], ...] = ()
    decoding: Decoding = DEFAULT
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {path: row for row, path in enumerate(self.paths)})

    def span(self) -> Span | None:
        """The values of the training images of more than 8 bits."""
        return joined([span for row, span in self.spans if self.training[row]])

    def headers(
        self, paths: list[str], decoding: Decoding = DEFAULT, progress: Progress = lambda done, total: None
    ) -> tuple[Headers, int, np.ndarray]:
        """The result of `headers.inspect_headers`, the number of files opened for it, and (N, 16) digests.

        The digest of a file that was opened is zero. Opens the files that are not in the manifest, or whose size or
        time has changed since the scan; with another decoding also those that it may treat in another way.
        """
        rows = np.fromiter((self._rows.get(path, -1) for path in paths), np.int64, len(paths))
        known = np.flatnonzero(rows >= 0)
        known = known[(file_stats([paths[i] for i in known.tolist()]) == self.stats[rows[known]]).all(axis=1)]
        known = known[self.stats[rows[known], 0] >= 0]  # a file missing then and now is opened: it may be back by then
        changed = len(paths) - len(known)
        if decoding != self.decoding:
            differing = [row for row, _ in (*self.bad, *self.tolerated, *self.spans)]
            known = known[~np.isin(rows[known], differing) & (decoding.channels == self.decoding.channels)]
        sizes = np.zeros((len(paths), 2), dtype=np.int32)
        sizes[known] = self.sizes[rows[known]]
        reasons = dict(self.bad)
        bad = [(i, reasons[row]) for i, row in zip(known.tolist(), rows[known].tolist(), strict=True) if row in reasons]
        stale = np.setdiff1d(np.arange(len(paths)), known, assume_unique=True)
        faults, deep, bands = dict(self.tolerated), {row for row, _ in self.spans}, dict(self.bands)
        positions = list(zip(known.tolist(), rows[known].tolist(), strict=True))
        headers = Headers(
            sizes,
            bad,
            [(i, faults[row]) for i, row in positions if row in faults],
            [i for i, row in positions if row in deep],
            [(i, bands[row]) for i, row in positions if row in bands],
        )
        if len(stale):
            new = inspect_headers([paths[i] for i in stale.tolist()], decoding, progress)
            sizes[stale] = new.sizes
            headers = Headers(
                sizes,
                sorted(headers.bad + [(int(stale[i]), reason) for i, reason in new.bad]),
                sorted(headers.tolerated + [(int(stale[i]), fault) for i, fault in new.tolerated]),
                sorted(headers.deep + [int(stale[i]) for i in new.deep]),
                sorted(headers.bands + [(int(stale[i]), found) for i, found in new.bands]),
            )
            unread = (rows[stale] >= 0) & (self.stats[rows[stale], 0] < 0)  # then missing, or without permission
            changed -= int(unread[[i for i, _ in new.bad]].sum())
        digests = np.zeros((len(paths), 16), dtype=np.uint8)
        digests[known] = self.digests[rows[known]]
        return headers, changed, digests


def file_stats(paths: Sequence[str]) -> np.ndarray:
    """(N, 2) int64: bytes and modification time in ns of every file, -1 for a missing one.

    Uses threads for network disks; on local ones a file takes 3 µs of CPU time either way.
    """
    stats = np.full((len(paths), 2), -1, dtype=np.int64)

    def stat_some(first: int) -> None:
        for i in range(first, min(first + task, len(paths))):
            try:
                with Timed(paths[i]):
                    status = os.stat(paths[i])
            except OSError:
                continue
            stats[i] = status.st_size, status.st_mtime_ns

    task = 16 * FILES_PER_TASK
    with ThreadPoolExecutor(min(MAX_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        for _ in pool.map(stat_some, range(0, len(paths), task)):
            pass
    return stats


# ---- location --------------------------------------------------------------------------------------------------------


def places(data: str, cache: Path) -> tuple[Path, Path]:
    """Paths of the manifest of a folder or list file: next to it, and in `cache`, used if that is not writable."""
    path = Path(data)
    name = hashlib.blake2b(os.fsencode(data), digest_size=16).hexdigest()
    adjacent = path / FILE_NAME if path.is_dir() else path.with_name(f".{path.name}{FILE_NAME}")
    return adjacent, cache / "manifests" / f"{name}.npz"


def find(data: str, cache: Path) -> ScanManifest | None:
    """The newest manifest of an absolute path, or None without a scan. Raises DataError if it is damaged."""
    written = [path for path in places(data, cache) if path.is_file()]
    return read(max(written, key=lambda path: path.stat().st_mtime_ns), data) if written else None


def join_manifests(manifests: Sequence[ScanManifest]) -> ScanManifest:
    """One manifest of all files of several, for `headers`; of those that decoded as the first did."""
    if len(manifests) == 1:
        return manifests[0]
    manifests = [one for one in manifests if one.decoding == manifests[0].decoding]
    starts = np.cumsum([0, *(len(one.paths) for one in manifests)]).tolist()

    def rows(name: str) -> tuple[tuple[int, Any], ...]:
        pairs = zip(starts, manifests, strict=False)
        return tuple((start + row, value) for start, one in pairs for row, value in getattr(one, name))

    columns = {name: np.concatenate([getattr(one, name) for one in manifests]) for name in _COLUMNS if name != "kinds"}
    return ScanManifest(
        paths=tuple(path for one in manifests for path in one.paths),
        kinds=np.zeros(starts[-1], dtype=np.uint8),
        kind_names=("",),
        histogram=np.sum([one.histogram for one in manifests], axis=0),
        bad=rows("bad"),
        tolerated=rows("tolerated"),
        spans=rows("spans"),
        bands=rows("bands"),
        decoding=manifests[0].decoding,
        **columns,
    )


# ---- the file --------------------------------------------------------------------------------------------------------

_COLUMNS: dict[str, tuple[type, tuple[int, ...]]] = {
    "stats": (np.int64, (2,)),
    "sizes": (np.int32, (2,)),
    "kinds": (np.uint8, ()),
    "digests": (np.uint8, (16,)),
    "training": (np.bool_, ()),
}


def write(manifest: ScanManifest, path: Path, data: str) -> None:
    """Replace or create the file atomically. Stores paths relative to `data`, so that both can move together.

    Raises OSError.
    """
    prefix = _prefix(data)
    names = "\0".join(path.removeprefix(prefix) for path in manifest.paths)
    about = {
        "format": FORMAT,
        "kind_names": manifest.kind_names,
        # without the path, which may change
        "bad": [(row, reason.removeprefix(printable(manifest.paths[row]))) for row, reason in manifest.bad],
        "tolerated": manifest.tolerated,
        "bands": manifest.bands,
        "decoding": asdict(manifest.decoding),
    }
    columns = {name: getattr(manifest, name) for name in _COLUMNS}
    columns |= {"spans": np.array([_numbers(row, span) for row, span in manifest.spans], np.float64).reshape(-1, 7)}
    columns |= {"names": _as_bytes(os.fsencode(names)), "about": _as_bytes(json.dumps(about).encode())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, histogram=manifest.histogram, **columns)


def read(path: Path, data: str) -> ScanManifest:
    """The manifest in a file. Raises DataError if it is damaged, or of another version."""
    try:
        return _read(path, data)
    except Exception as error:  # untrusted bytes: readers of zip, npy and JSON may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{printable(str(path))} is not a usable manifest ({printable(reason)}): delete it, or run fastmoco scan "
            f"{printable(data)} again"
        ) from error


def _read(path: Path, data: str) -> ScanManifest:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, so its size is not bounded")
    with np.load(path, allow_pickle=False) as columns:
        about: dict[str, Any] = json.loads(columns["about"].tobytes())
        if about["format"] != FORMAT:
            raise ValueError(f"it has format {about['format']!r}, expected {FORMAT}")
        prefix = _prefix(data)
        names = os.fsdecode(columns["names"].tobytes()).split("\0")
        paths = tuple(name if os.path.isabs(name) else prefix + name for name in names)
        values = {name: columns[name] for name in _COLUMNS}
        histogram, spans = columns["histogram"], columns["spans"]
    for name, (kind, shape) in _COLUMNS.items():
        if values[name].dtype != kind or values[name].shape != (len(paths), *shape):
            raise ValueError(
                f"it has {len(paths):,} names and {name} of shape {values[name].shape}, {values[name].dtype}"
            )
    channels = about["decoding"].get("channels", 3)
    if histogram.shape != (channels, 256) or histogram.dtype != np.int64 or (values["sizes"] < 0).any():
        raise ValueError("its numbers are invalid")
    rows = [*spans[:, 0].tolist(), *(row for row, _ in about["tolerated"])] if spans.shape[1:] == (7,) else [-1]
    if spans.dtype != np.float64 or not all(0 <= row < len(paths) for row in rows):
        raise ValueError("its values of more than 8 bits are invalid")
    kind_names = tuple(str(name) for name in about["kind_names"])
    bad = tuple((int(row), printable(paths[row]) + str(reason)) for row, reason in about["bad"])
    if (
        values["kinds"].max() >= len(kind_names)
        or (np.flatnonzero(values["sizes"].min(1) == 0) != [r for r, _ in bad]).any()
    ):
        raise ValueError("its columns are inconsistent")
    value_range = about["decoding"]["value_range"]
    return ScanManifest(
        paths=paths,
        kind_names=kind_names,
        histogram=histogram,
        bad=bad,
        tolerated=tuple((int(row), printable(str(fault))) for row, fault in about["tolerated"]),
        spans=tuple((int(row[0]), _span(row)) for row in spans.tolist()),
        bands=tuple((int(row), int(found)) for row, found in about.get("bands", ())),
        decoding=Decoding(value_range and (value_range[0], value_range[1]), about["decoding"]["truncated"], channels),
        **values,
    )


def _numbers(row: int, span: Span) -> tuple[float, ...]:
    """A span as a row of numbers, a white that is undefined as -1."""
    white = -1 if span.white is None else span.white
    return row, span.least, span.low, span.high, span.most, white, span.whole


def _span(numbers: list[float]) -> Span:
    """The inverse of `_numbers`."""
    _, least, low, high, most, white, whole = numbers
    return Span(least, low, high, most, None if white < 0 else int(white), bool(whole))


def _prefix(data: str) -> str:
    folder = data if os.path.isdir(data) else os.path.dirname(data)
    return os.path.join(folder, "")


def _as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)
