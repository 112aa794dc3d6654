"""Convert any data set fastmoco reads into one `.beton` file: `python tools/make_ffcv.py DATA OUT.beton`.

Plain JPEGs (8 bits, grey or colour, upright) are copied byte for byte, so a run on the file sees the same pixels as a
run on the folder. Everything else is stored as raw pixels, which is equally exact, unless --quality allows a JPEG.
Every image is decoded once during the conversion, so all images in the file are readable.

Exit codes: 0 success, 2 invalid setting, 3 bad image or full disk.
"""

from __future__ import annotations

import io
import os
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import PIL
import torch
import torch.nn.functional as F
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
from fastmoco.run.environment import version
from fastmoco.run.preemption import StopFlag
from pipelines.data.beton import is_whole_jpeg
from pipelines.data.beton_manifest import BetonManifest
from pipelines.data.beton_writer import BetonWriter
from pipelines.data.dataset import MAX_BAD_FRACTION, load_dataset
from pipelines.data.decode import printable
from pipelines.data.formats import jpeg
from pipelines.data.index import ImageIndex
from pipelines.data.notes import decoding_lines
from pipelines.data.space import check_space, pixel_bytes, stored_bytes
from pipelines.errors import DataError
from pipelines.files import absolute, is_full
from pipelines.platforms import usable_cpus
from pipelines.randomness import Domain, philox, uniform

RESIZED_QUALITY = 95
Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Settings(ImagesConfig):
    """Convert a data set into one .beton file for --pipeline ffcv.

    Plain JPEGs are copied byte for byte; other images are stored as raw pixels, unless --quality is given.
    """

    data: Annotated[tuple[str, ...], Positional, ONE]
    """Folder of images, list file, tar archives, or the name of a data set."""
    out: Positional[str]
    """The file to write, ending in .beton; its manifest is written next to it."""
    split: Literal["train", "test"] = "train"
    """Which split of the data set."""
    mode: Literal["jpg", "raw", "proportion"] = "jpg"
    """Store JPEGs, raw pixels (several times larger, nothing to decode), or a share as JPEG."""
    proportion: float = 0.5
    """The share of images stored as JPEG by --mode proportion."""
    max_resolution: int | None = None
    """Shrink images whose longer side exceeds this. Changes the content of random crops."""
    min_resolution: int | None = None
    """Shrink images whose shorter side exceeds this. Changes the content of random crops."""
    quality: Annotated[int | None, tyro.conf.arg(metavar="1-100")] = None
    """JPEG quality for images that cannot be copied. Unset: raw pixels, and 95 for shrunk images."""
    workers: int | None = None
    """Decoding threads (None: one for every core that this process may use)."""


def check(settings: Settings) -> None:
    """Raises ConfigError for an invalid setting."""
    if not settings.out.endswith(".beton"):
        raise ConfigError(f"{printable(settings.out)} is not a valid name; expected one that ends in .beton")
    if not 0 <= settings.proportion <= 1:
        raise ConfigError(f"--proportion {settings.proportion}: expected a share from 0 to 1")
    if settings.quality is not None and not 1 <= settings.quality <= 100:
        raise ConfigError(f"--quality {settings.quality}: expected 1 to 100")
    if settings.workers is not None and settings.workers < 1:
        raise ConfigError(f"--workers {settings.workers}: expected 1 or more")
    if settings.max_resolution is not None and settings.min_resolution is not None:
        raise ConfigError("--max-resolution and --min-resolution both set the size; give one of them")
    for flag, side in (("max", settings.max_resolution), ("min", settings.min_resolution)):
        if side is not None and side < 1:
            raise ConfigError(f"--{flag}-resolution {side}: expected a number of pixels, 1 or more")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image as it will be stored."""

    data: bytes | np.ndarray
    size: tuple[int, int]
    how: Literal["copied", "encoded", "raw"]


def encode(index: ImageIndex, i: int, settings: Settings) -> Encoded:
    """Image i of the index, decoded to verify it. Raises DataError for a bad image."""
    pixels = index.read(i)
    target = shrunk(pixels.shape[:2], settings)
    as_jpeg = settings.mode == "jpg" or (settings.mode == "proportion" and in_share(i, settings.proportion))
    if target != pixels.shape[:2]:
        planes = torch.tensor(pixels).permute(2, 0, 1)[None]  # a copy: Pillow's arrays are read-only
        pixels = F.interpolate(planes, size=target, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        quality = settings.quality or RESIZED_QUALITY
    else:
        if as_jpeg and (data := plain_jpeg(index, i)) is not None:
            return Encoded(data, target, "copied")
        quality = settings.quality
    if not as_jpeg or quality is None:
        return Encoded(pixels, target, "raw")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    return Encoded(buffer.getvalue(), target, "encoded")


def shrunk(size: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """(height, width) after --max-resolution or --min-resolution; images are never enlarged."""
    if settings.max_resolution is not None:
        factor = settings.max_resolution / max(size)
    elif settings.min_resolution is not None:
        factor = settings.min_resolution / min(size)
    else:
        return size
    return size if factor >= 1 else (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))


def in_share(i: int, proportion: float) -> bool:
    """Whether image i is in the share stored as JPEG: the same images at every conversion."""
    return bool(uniform(philox(0, Domain.SUBSET, sample=i)[:1])[0] < proportion)


def plain_jpeg(index: ImageIndex, i: int) -> bytes | None:
    """The bytes of image i if they are a JPEG that any decoder decodes like `decode` and that a reader takes."""
    if not index.is_encoded(i):
        return None
    data = index.read_bytes(i)
    if not data.startswith(b"\xff\xd8"):
        return None
    header = jpeg.read_header(data)
    plain = header.components != 4 and header.oriented()[0] == 1 and data.rfind(jpeg.END, header.scan) >= 0
    height, width = index.sizes[i].tolist()
    return data if plain and is_whole_jpeg(data, (height, width)) else None


def relative_names(index: ImageIndex, data: Sequence[str]) -> list[str]:
    """Names of the images in the manifest: paths relative to the converted folder, or numbers."""
    if index.records is not None:
        return list(index.records.names)
    if index.paths is None:
        return [f"image {i}" for i in range(len(index))]
    root = absolute(data[0])
    inside = os.path.isdir(root) and all(path.startswith(root + os.sep) for path in index.paths)
    base = root if inside else os.path.commonpath([os.path.dirname(path) for path in index.paths])
    return [os.path.relpath(path, base) for path in index.paths]


def convert(
    index: ImageIndex, settings: Settings, console: Console, quarantine: tuple[tuple[str, str], ...] = ()
) -> BetonManifest:
    """Write `settings.out` and its manifest from an index. On DataError, neither is left."""
    names = relative_names(index, settings.data)
    versions = {
        "fastmoco": version(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "torch": str(torch.__version__),
    }
    left_out, stored = [list(entry) for entry in quarantine], Counter(copied=0, encoded=0, raw=0)
    allowed = MAX_BAD_FRACTION * len(index) if settings.bad_images == "quarantine" else 0
    stored_now, pixels = stored_bytes(index), pixel_bytes(index)
    largest = max(65_536 + 4 * int(pixels.max()) // 3, int(stored_now.max()))  # upper bound for any encoder
    least = pixels if settings.mode == "raw" else np.minimum(stored_now, pixels)
    if settings.max_resolution or settings.min_resolution or settings.quality:
        least = np.zeros_like(least)
    with (
        Counted(console, f"converting {index.name}", len(index)) as progress,
        BetonWriter(settings.out, len(index), largest) as writer,
        ThreadPoolExecutor(threads := settings.workers or usable_cpus()) as pool,
    ):
        try:
            check_space(Path(settings.out).absolute(), int(least.sum() - allowed * least.max()))
            for i, future in _in_order(pool, index, settings, 4 * threads):
                try:
                    image = future.result()
                    label = None if index.labels is None else int(index.labels[i])
                    writer.add(image.data, image.size, label, names[i])
                    stored[image.how] += 1
                except DataError as error:
                    left_out.append([names[i], str(error)])
                    if len(left_out) - len(quarantine) > allowed:
                        raise
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        if not len(writer):
            raise DataError(f"no image of {printable(index.name)} is left to write")
        return writer.finish(
            lambda length, tables_sha256, image_digests: BetonManifest(
                dataset=index.name,
                bytes=length,
                images=len(writer),
                tables_sha256=tables_sha256,
                image_digests=image_digests,
                class_names=list(index.class_names) if index.labels is not None else [],
                names=writer.names,
                stored=dict(stored),
                settings=asdict(settings),
                quarantine=left_out,
                versions=versions,
            )
        )


def _in_order(
    pool: ThreadPoolExecutor, index: ImageIndex, settings: Settings, ahead: int
) -> Iterator[tuple[int, Future[Encoded]]]:
    """Images in the order of the index, with a few decoded ahead."""
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    positions = iter(range(len(index)))
    while True:
        for i in islice(positions, ahead - len(waiting)):
            waiting.append((i, pool.submit(encode, index, i, settings)))
        if not waiting:
            return
        yield waiting.popleft()


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True)
    started = time.perf_counter()
    try:
        settings = parse_tool(Settings, arguments, "make_ffcv.py")
    except ConfigError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.CONFIG
    try:
        with StopFlag():
            check(settings)
            torch.set_num_threads(1)  # the workers are the threads
            with reported(console, "reading headers") as progress:
                dataset = load_dataset(settings.data, **settings.loading(), progress=progress)
            for line in choice_lines(dataset.choices, classes_of(dataset)):
                console.print(line, markup=False, soft_wrap=True)
            for line in decoding_lines(dataset):
                console.print(line, style="yellow", markup=False, soft_wrap=True)
            index = dataset.train if settings.split == "train" else dataset.test
            if index is None:
                raise ConfigError(
                    f"{printable(settings.data[0])} has no test split; expected a folder with train and val"
                )
            manifest = convert(index, settings, console, dataset.quarantine if settings.split == "train" else ())
    except ConfigError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.CONFIG
    except DataError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.DATA
    except OSError as error:
        reason = f"cannot write {printable(settings.out)} ({error.strerror or error}), and nothing is left of it"
        if is_full(error):
            reason += ": make room, or choose another disk"
        console.print(reason, style="red", markup=False, soft_wrap=True)
        return ExitCode.DATA
    except Preempted as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return ExitCode.PREEMPTED
    seconds, stored = time.perf_counter() - started, manifest.stored
    console.print(
        f"{printable(settings.out)}: {manifest.images:,} images ({stored['copied']:,} copied, "
        f"{stored['encoded']:,} encoded, {stored['raw']:,} raw), {manifest.bytes:,} bytes, {seconds:.1f} s, "
        f"{len(manifest.quarantine):,} quarantined",
        markup=False,
        soft_wrap=True,
    )
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_tool(main))
