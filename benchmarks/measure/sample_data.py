"""Images to feed a loader with: the user's, or JPEGs drawn here so that a benchmark needs nothing but this checkout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from pipelines.data.beton import read_index
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from tools.make_ffcv import Settings as ConverterSettings
from tools.make_ffcv import convert

SMALL = 64  # crops of up to this many pixels are fed from images of 32×32, as CIFAR's
DRAWN, BETON = "generated", "images.beton"  # in the folder of a benchmark
PHOTO_SIZE = (375, 500)  # height and width of most of ImageNet


def open_index(data: str | None, side: int, limit: int | None, scratch: Path) -> ImageIndex:
    """The training images of a folder, a list, a `.beton` file or a named set; without any, drawn JPEGs in `scratch`.

    Raises DataError.
    """
    if data is None:
        folder = scratch / DRAWN
        draw_jpegs(folder, *((1_024, (32, 32)) if side <= SMALL else (256, PHOTO_SIZE)))
        data = str(folder)
    if data.endswith(".beton"):
        return read_index(data)
    return load_dataset(data, data_root="~/.cache/fastmoco", limit=limit).train


def draw_jpegs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """`count` colour JPEGs of quality 90 and 4:2:0, 100 KB each at 500×375 and 1.1 KB at 32×32: as photographs are.

    Noise whose amplitude halves with every octave, a little more at the finest: with it, the Huffman decoder has as
    many bits to read as in a photograph.
    """
    folder.mkdir(parents=True)
    height, width = size
    for i in range(count):
        random = np.random.default_rng(i)
        image = np.full((height, width, 3), 127.5, dtype=np.float32)
        octaves = int(np.log2(min(size)))
        for octave in range(1, octaves):
            coarse = random.uniform(-1, 1, (2**octave, 2**octave, 3)).astype(np.float32)
            planes = [
                np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC))
                for c in range(3)
            ]
            image += 90 / 2**octave * 1.5 * np.stack(planes, axis=-1)
        image += random.normal(0, 7, (height, width, 1))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=90)


def as_beton(index: ImageIndex, scratch: Path, workers: int) -> ImageIndex:
    """The same images in a `.beton` file, JPEGs copied byte for byte: what FFCV reads."""
    if index.records is not None:
        return index
    path = str(scratch / BETON)
    settings = ConverterSettings(data=index.name, out=path, workers=max(1, workers))
    with Progress(disable=True) as progress:
        convert(index, settings, progress)
    return read_index(path)


def stored_bytes(index: ImageIndex) -> int:
    """Bytes of the files, records or pixels of an index."""
    if index.pixels is not None:
        return index.pixels.nbytes
    if index.records is not None:
        return int(index.records.lengths.sum())
    assert index.paths is not None
    return sum(os.stat(path).st_size for path in index.paths)
