"""Images for the benchmarks: the user's, or generated JPEGs, so that a benchmark needs no data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.measure.archives import CACHE
from fastmoco.errors import ConfigError
from pipelines.data.beton import read_index
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from tools.make_ffcv import Settings as ConverterSettings
from tools.make_ffcv import convert

SMALL = 64  # views of up to this many pixels are cropped from generated images of 32×32, the size of CIFAR's
GENERATED, BETON = "generated", "images.beton"  # in a benchmark's temporary folder
PHOTO_SIZE = (375, 500)  # height and width of most ImageNet images


def open_index(data: str | None, side: int, limit: int | None, scratch: Path, batch_size: int = 0) -> ImageIndex:
    """The training images of a folder, a list, a `.beton` file or a named set, or JPEGs generated in `scratch`.

    Raises DataError, and ConfigError for fewer images than a batch.
    """
    if data is None:
        folder = scratch / GENERATED
        generate_jpegs(folder, *((1_024, (32, 32)) if side <= SMALL else (256, PHOTO_SIZE)))
        data = str(folder)
    index = read_index(data) if data.endswith(".beton") else load_dataset(data, data_root=CACHE, limit=limit).train
    if len(index) < batch_size:
        raise ConfigError(f"--batch-size {batch_size} is more than the {len(index)} images: use fewer")
    return index


def generate_jpegs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """`count` colour JPEGs of quality 90 and 4:2:0, with the size of photographs: 100 KB at 500×375, 1.1 KB at 32×32.

    The pixels are noise whose amplitude halves with every octave, plus some at the finest scale, so that the Huffman
    decoder reads as many bits as for a photograph.
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
    """The same images in a `.beton` file for FFCV, with JPEGs copied unchanged."""
    if index.records is not None:
        return index
    path = str(scratch / BETON)
    settings = ConverterSettings(data=(index.name,), out=path, workers=max(1, workers))
    convert(index, settings, Console(quiet=True))
    return read_index(path)


def describe_data(index: ImageIndex) -> dict[str, Any]:
    """The `data` entry of a result."""
    return {"images": len(index), "stored_bytes": stored_bytes(index), "description": index.describe()}


def stored_bytes(index: ImageIndex) -> int:
    """Size of the files, records or pixels of an index."""
    if index.pixels is not None:
        return index.pixels.nbytes
    if index.records is not None:
        return int(index.records.lengths.sum())
    assert index.paths is not None
    return sum(os.stat(path).st_size for path in index.paths)
