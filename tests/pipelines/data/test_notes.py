"""What is said of the sizes and the axes of images, and of data that is no folder and no list."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.dataset import load_dataset
from pipelines.data.notes import decoding_lines
from pipelines.errors import DataError


def test_tiny_and_long_images_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a", (32, 32)), ("b", (1, 1)), ("c", (200, 20)), ("d", (20, 161)), ("e", (160, 20))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    assert decoding_lines(load_dataset(str(folder), data_root=tmp_path)) == [
        "1 image has a side of less than 8 pixels, which crops enlarge: b.png is 1×1",
        "2 images have sides of more than 8 to 1, of which a crop shows a part: e.g. c.png is 200×20",
    ]


@pytest.mark.parametrize(("shape", "axes"), [((3, 9, 11), "channels, height, width"), ((9, 11), "height, width")])
def test_the_axes_of_arrays_are_said(tmp_path: Path, shape: tuple[int, ...], axes: str) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "1.npy", np.zeros(shape, np.uint8))
    assert decoding_lines(load_dataset(str(folder), data_root=tmp_path)) == [f"arrays are taken as ({axes})"]


def test_archives_and_single_images_are_no_lists(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "1.png", "1.png")
    for name, reason in (
        ("images.zip", "it is a zip archive: unzip it"),
        ("1.png", "is a single image; expected a folder"),
    ):
        with pytest.raises(DataError, match=reason):
            load_dataset(str(tmp_path / name), data_root=tmp_path)
