"""Rates of the disk with the images: one large file, its fsync, and many small files in random order."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.units import bytes_text, si

_BLOCK, _BLOCKS = 2**20, 48
_SMALL_FILES, _SMALL_BYTES = 200, 64 * 2**10  # 12.5 MiB
_SYNCS = 5
_MAX_S = 3.0  # of writing: a slow disk writes fewer blocks
_LEAST_FREE = 2**30


def disk(target: Target) -> Finding:
    """Writes up to 64 MiB into a temporary folder in `target.folder`.

    Files just written are dropped from the page cache before they are read, where the system allows it; rates of some
    virtual disks are those of a cache all the same.
    """
    usage = shutil.disk_usage(target.folder)
    figures: dict[str, float] = {"free_bytes": usage.free, "total_bytes": usage.total}
    free = f"{bytes_text(usage.free)} free of {bytes_text(usage.total)}"
    if usage.free < 4 * _BLOCK * _BLOCKS:
        advice = "free some space: a run writes checkpoints and caches"
        return Finding(status=Status.SKIPPED, text=f"only {free} in {target.folder}", figures=figures, advice=advice)
    try:
        with tempfile.TemporaryDirectory(prefix=".fastmoco-doctor-", dir=target.folder) as folder:
            figures |= measure(Path(folder))
    except PermissionError:
        advice = "its rates were not measured; choose a writable --data folder for that"
        return Finding(
            status=Status.SKIPPED, text=f"{target.folder} is read-only, {free}", figures=figures, advice=advice
        )
    text = (
        f"{free}; read {si(figures['read_bytes_per_s'], 'B/s')}, write {si(figures['write_bytes_per_s'], 'B/s')}, "
        f"fsync {si(figures['fsync_s'], 's')}, {figures['small_files_per_s']:,.0f} files/s of 64 KiB"
    )
    advice = "little is free: a run writes checkpoints and caches" if usage.free < _LEAST_FREE else ""
    return Finding(text=text, figures=figures, advice=advice)


def measure(folder: Path) -> dict[str, float]:
    """Bytes/s of a sequential write (with fsync) and read, median seconds of an fsync, small files read per second."""
    block = random.Random(0).randbytes(_BLOCK)
    large, began, written = folder / "large", time.perf_counter(), 0
    with open(large, "wb", buffering=0) as file:
        while written < _BLOCKS:
            file.write(block)
            written += 1
            if time.perf_counter() - began > _MAX_S:
                break
        os.fsync(file.fileno())
    write_s = time.perf_counter() - began
    syncs = [_sync_s(folder / "sync") for _ in range(_SYNCS)]

    _forget(large)
    began = time.perf_counter()
    with open(large, "rb", buffering=0) as file:
        while file.read(_BLOCK):
            pass
    read_s = time.perf_counter() - began

    names = [folder / f"{i}.bin" for i in range(_SMALL_FILES)]
    for i, name in enumerate(names):
        name.write_bytes(block[i : i + _SMALL_BYTES])
    for name in names:
        _forget(name)
    random.Random(1).shuffle(names)
    began, read = time.perf_counter(), 0
    for name in names:
        name.read_bytes()
        read += 1
        if time.perf_counter() - began > _MAX_S:
            break
    small_s = time.perf_counter() - began
    return {
        "write_bytes_per_s": written * _BLOCK / write_s,
        "read_bytes_per_s": written * _BLOCK / read_s,
        "fsync_s": statistics.median(syncs),
        "small_files_per_s": read / small_s,
    }


def _sync_s(path: Path) -> float:
    """Seconds to append 4 KiB and have them on the disk."""
    with open(path, "ab", buffering=0) as file:
        file.write(bytes(4096))
        began = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def _forget(path: Path) -> None:
    """Write a file to the disk and drop it from the page cache."""
    with suppress(OSError, AttributeError), open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
