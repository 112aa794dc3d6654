"""Pack any data set fastmoco reads into tar archives in WebDataset layout: `python tools/make_shards.py DATA OUT`.

Encoded images are copied byte for byte, so a run on the archives sees the same pixels as a run on the folder; images in
memory become PNG, which is equally exact. OUT is created when everything is written.

Exit codes: 0 success, 2 invalid setting, 3 bad image or full disk.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmoco.errors import ConfigError, ExitCode, Preempted
from fastmoco.run.preemption import StopFlag
from pipelines.data.dataset import BadImages, load_dataset
from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.data.tar_shards import CLASS_NAMES
from pipelines.errors import DataError
from pipelines.randomness import Domain, permutation

READERS = 8  # threads that read files: they wait for the disk
READ_AHEAD = 64  # images
Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Pack a data set into tar archives, for network disks and for disks that allow few files."""

    data: Positional[str]
    """A folder, a list of paths, or the name of a data set."""
    out: Positional[Path]
    """The folder of archives to create; end it in /train or /val to have both splits in one folder."""
    split: Literal["train", "test"] = "train"
    """Which split of the data set."""
    data_root: str = "~/.cache/fastmoco"
    """The folder of named data sets."""
    shard_mib: float = 256.0
    """An archive is closed when it reaches this size."""
    shuffle: int | None = None
    """Shuffle the images with this seed, for --order archives. Unset: keep their order, so that runs are the same."""
    bad_images: BadImages = "error"
    """Stop at a bad image, or leave it out."""


def make(settings: Settings, console: Console) -> None:
    """Raises ConfigError for an invalid setting, DataError for a bad image, OSError if writing fails."""
    out = settings.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{printable(str(settings.out))} exists and is not an empty folder; choose another name")
    if settings.shard_mib <= 0:
        raise ConfigError(f"--shard-mib {settings.shard_mib}: expected a size above 0")
    began = time.monotonic()
    dataset = load_dataset(settings.data, data_root=settings.data_root, bad_images=settings.bad_images)
    index = dataset.train if settings.split == "train" else dataset.test
    if index is None:
        raise DataError(f"{printable(settings.data)} has no test split; expected --split train")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # a leftover of an interrupted run
    part.mkdir(parents=True)
    try:
        count, length = _write(index, part, settings, console)
        if index.labels is not None:
            names = "".join(f"{name}\n" for name in index.class_names)
            (part / CLASS_NAMES).write_text(names, encoding="utf-8", errors="surrogateescape")
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    console.print(
        f"{len(index):,} images, {length / 2**20:,.1f} MiB in {count:,} {'archive' if count == 1 else 'archives'} in "
        f"{time.monotonic() - began:.1f} s: {printable(str(settings.out))}"
    )
    for path, reason in dataset.quarantine:
        console.print(f"left out: {printable(path)} ({printable(reason)})", style="yellow")


def _write(index: ImageIndex, folder: Path, settings: Settings, console: Console) -> tuple[int, int]:
    """Writes archives 000000.tar, … of the images of an index. Returns their number and total bytes."""
    order = np.arange(len(index))
    if settings.shuffle is not None:
        order = permutation(settings.shuffle, Domain.ORDER, len(index))
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    count, total = 0, 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(index))
        contents = enumerate(_contents(index, order))
        entry = next(contents, None)
        while entry is not None:
            with tarfile.open(folder / f"{count:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                while entry is not None and archive.offset < settings.shard_mib * 2**20:
                    number, (i, (extension, data)) = entry
                    _add(archive, f"{number:08d}{extension}", data)
                    if index.labels is not None:
                        _add(archive, f"{number:08d}.cls", str(index.labels[i]).encode())
                    progress.advance(task)
                    entry = next(contents, None)
            count, total = count + 1, total + archive.offset
    return count, total


def _contents(index: ImageIndex, order: np.ndarray) -> Iterator[tuple[int, tuple[str, bytes]]]:
    """(position, (extension, bytes)) of the images in this order, read ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(order), READ_AHEAD):
            positions = order[start : start + READ_AHEAD].tolist()
            yield from zip(positions, pool.map(lambda i: _content(index, i), positions), strict=True)


def _content(index: ImageIndex, i: int) -> tuple[str, bytes]:
    if index.is_encoded(i):
        name = index.paths[i] if index.paths is not None else index.records.names[i] if index.records else ""
        return os.path.splitext(name)[1].lower() or ".jpg", index.read_bytes(i)
    buffer = io.BytesIO()
    Image.fromarray(index.read(i)).save(buffer, "PNG")
    return ".png", buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member without owner and time, so that archives are reproducible."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))


def main(argv: list[str] | None = None) -> int:
    console = Console(stderr=True)
    try:
        with StopFlag():
            make(tyro.cli(Settings, args=argv, description=Settings.__doc__), console)
    except ConfigError as error:
        return _fail(str(error), ExitCode.CONFIG)
    except DataError as error:
        return _fail(str(error), ExitCode.DATA)
    except OSError as error:
        return _fail(f"cannot write ({error.strerror or error})", ExitCode.DATA)
    except Preempted as error:
        return _fail(str(error), ExitCode.PREEMPTED)
    return ExitCode.DONE


def _fail(message: str, code: ExitCode) -> int:
    print(f"make_shards: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
