"""Files are images by their names where these tell, and by their first bytes where they do not."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data import file_kinds
from pipelines.data.dataset import load_dataset
from pipelines.data.formats.common import FORMATS
from tests.oddities import encode, fill, picture


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_recognised_by_content(tmp_path: Path, kind: str) -> None:
    (tmp_path / "IMG_0001").write_bytes(encode(picture(9, 7), kind))
    (tmp_path / "photo.2024-05-01").write_bytes(encode(picture(9, 7), kind))
    dataset = load_dataset(str(tmp_path), data_root=tmp_path / "cache")
    assert dataset.train.sizes.tolist() == [[9, 7], [9, 7]]
    assert dataset.skipped == 0


@pytest.mark.parametrize("name", ["a.JFIF", "b.jpe", "c.Jif", "d.gif", "e.dib", "f.pbm"])
def test_names_of_images(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(encode(picture(9, 7), "JPEG"))
    assert len(load_dataset(str(tmp_path), data_root=tmp_path / "cache").train) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"P4 is no image", b"BM, and so on, is the beginning of a text", b"RIFF\0\0\0\0WAVEfmt ", b"\xff\xd8"],
)
def test_other_content_is_no_image(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "unnamed").write_bytes(content)
    dataset = load_dataset(str(tmp_path), data_root=tmp_path / "cache")
    assert len(dataset.train) == 1
    assert dataset.choices.passed_over() == "1 file: 1 without an extension"


def test_a_frame_of_a_gif(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((5, 6, 3), value, dtype=np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    index = load_dataset(str(tmp_path), data_root=tmp_path / "cache").train
    assert abs(int(index.read(0).mean()) - 10) <= 2


def test_named_images_are_not_opened_to_list_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "set", *(f"{i}.JPEG" for i in range(5)), "notes.txt", "x.mp4", "photo")
    opened = []
    original = file_kinds.open_regular
    monkeypatch.setattr(file_kinds, "open_regular", lambda path: (opened.append(path), original(path))[1])
    monkeypatch.setattr(builtins, "open", lambda *_: pytest.fail("a file is opened"))
    from pipelines.data.files import list_folder

    assert len(list_folder(str(tmp_path / "set")).paths) == 6
    assert [os.path.basename(path) for path in opened] == ["photo"]


def test_many_kinds_are_summed_up() -> None:
    others = {".txt": 6, ".json": 2, ".mp4": 1, "": 3, ".xml": 2, ".csv": 1}
    expected = "15 files: 6 .txt, 3 without an extension, 2 .json, 2 .xml, 2 of 2 other kinds"
    assert file_kinds.describe_others(others) == expected
