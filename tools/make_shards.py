"""Pack any data set fastmoco reads into tar archives in WebDataset layout: `python tools/make_shards.py DATA OUT`.

Encoded images are copied byte for byte, so a run on the archives sees the same pixels as a run on the folder; images in
memory become PNG, which is equally exact. Every image is decoded once, so all images in the archives are readable. OUT
is created when everything is written, and has been read again.

Exit codes: 0 success, 2 invalid setting, 3 bad image or full disk.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console

from fastmoco.config import ImagesConfig
from fastmoco.config.arguments import parse_tool
from fastmoco.config.positional import ONE
from fastmoco.errors import ConfigError, ExitCode, Preempted
from fastmoco.output import run_tool
from fastmoco.progress import Counted, reported
from fastmoco.run.data_facts import choice_lines, classes_of
from fastmoco.run.preemption import StopFlag
from pipelines.data.dataset import MAX_BAD_FRACTION, load_dataset
from pipelines.data.decode import printable
from pipelines.data.file_kinds import EXTENSIONS, extension
from pipelines.data.index import ImageIndex
from pipelines.data.notes import decoding_lines
from pipelines.data.shard_writer import ShardWriter
from pipelines.data.space import check_space, stored_bytes
from pipelines.errors import DataError
from pipelines.files import is_full
from pipelines.randomness import Domain, permutation

READERS = 8  # threads that read files: they wait for the disk
READ_AHEAD = 64  # images
Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Settings(ImagesConfig):
    """Pack a data set into tar archives, for network disks and for disks that allow few files."""

    data: Annotated[tuple[str, ...], Positional, ONE]
    """Folder of images, list file, tar archives, or the name of a data set."""
    out: Positional[Path]
    """The folder of archives to create; end it in /train or /val to have both splits in one folder."""
    split: Literal["train", "test"] = "train"
    """Which split of the data set."""
    shard_mib: float = 256.0
    """An archive is closed when it reaches this size."""
    shuffle: int | None = None
    """Shuffle the images with this seed, for --order archives. Unset: keep their order, so that runs are the same."""


def make(settings: Settings, console: Console) -> None:
    """Raises ConfigError for an invalid setting, DataError for a bad image, OSError if writing fails."""
    out = settings.out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"{printable(str(settings.out))} exists and is not an empty folder; choose another name")
    if settings.shard_mib <= 0:
        raise ConfigError(f"--shard-mib {settings.shard_mib}: expected a size above 0")
    began = time.monotonic()
    with reported(console, "reading headers") as progress:
        dataset = load_dataset(settings.data, **settings.loading(), progress=progress)
    for line in choice_lines(dataset.choices, classes_of(dataset)):
        console.print(line, markup=False, soft_wrap=True)
    for line in decoding_lines(dataset):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    index = dataset.train if settings.split == "train" else dataset.test
    if index is None:
        raise DataError(f"{printable(settings.data[0])} has no test split; expected --split train")
    with ShardWriter(out, settings.shard_mib * 2**20, dataset.train.decoding) as writer:
        bad = _write(index, writer, settings, console)
        writer.finish(index.class_names if index.labels is not None else ())
    count, length = writer.archives, writer.total_bytes
    console.print(
        f"{len(index) - len(bad):,} images, {length / 2**20:,.1f} MiB in {count:,} "
        f"{'archive' if count == 1 else 'archives'} in {time.monotonic() - began:.1f} s: "
        f"{printable(str(settings.out))}",
        markup=False,
    )
    for path, reason in (*dataset.quarantine, *bad):
        console.print(f"left out: {printable(path)} ({printable(reason)})", style="yellow", markup=False)


def _write(index: ImageIndex, writer: ShardWriter, settings: Settings, console: Console) -> list[tuple[str, str]]:
    """Writes the images of an index, and returns (path, reason) of those that are left out because they are bad."""
    order = np.arange(len(index))
    if settings.shuffle is not None:
        order = permutation(settings.shuffle, Domain.ORDER, len(index))
    allowed = MAX_BAD_FRACTION * len(index) if settings.bad_images == "quarantine" else 0
    if index.pixels is None:
        members = stored_bytes(index) + tarfile.BLOCKSIZE
        check_space(writer.path, int(members.sum() - allowed * members.max()))
    bad: list[tuple[str, str]] = []
    with Counted(console, f"packing {index.name}", len(index)) as progress:
        for i, content in _contents(index, order):
            if isinstance(content, DataError):
                bad.append((index.path(i), str(content)))
                if len(bad) > allowed:
                    raise content
            else:
                height, width = index.sizes[i].tolist()
                writer.add(*content, (height, width), None if index.labels is None else int(index.labels[i]))
            progress.advance()
    if len(bad) == len(index):
        raise DataError(f"no image of {printable(index.name)} is left to write")
    return bad


def _contents(index: ImageIndex, order: np.ndarray) -> Iterator[tuple[int, tuple[str, bytes] | DataError]]:
    """(position, (extension, bytes)) of the images in this order, read ahead; the error of a bad image."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(order), READ_AHEAD):
            positions = order[start : start + READ_AHEAD].tolist()
            yield from zip(positions, pool.map(lambda i: _content(index, i), positions), strict=True)


def _content(index: ImageIndex, i: int) -> tuple[str, bytes] | DataError:
    """Image i as it will be stored, decoded once to verify it."""
    try:
        pixels = index.read(i)
        if index.is_encoded(i):
            name = index.paths[i] if index.paths is not None else index.records.names[i] if index.records else ""
            kind = extension(os.path.basename(name))
            return kind if kind in EXTENSIONS else ".jpg", index.read_bytes(i)
    except DataError as error:
        return error
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ".png", buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    console = Console(stderr=True)
    try:
        settings = parse_tool(Settings, argv, "make_shards.py")
    except ConfigError as error:
        return _fail(str(error), ExitCode.CONFIG)
    try:
        with StopFlag():
            make(settings, console)
    except ConfigError as error:
        return _fail(str(error), ExitCode.CONFIG)
    except DataError as error:
        return _fail(str(error), ExitCode.DATA)
    except OSError as error:
        reason = f"cannot write {printable(str(settings.out))} ({error.strerror or error}), and nothing is left of it"
        remedy = ": make room, or choose another disk" if is_full(error) else ""
        return _fail(reason + remedy, ExitCode.DATA)
    except Preempted as error:
        return _fail(str(error), ExitCode.PREEMPTED)
    return ExitCode.DONE


def _fail(message: str, code: ExitCode) -> int:
    print(f"make_shards: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run_tool(main))
