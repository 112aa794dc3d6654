"""Damaged images of every format: pixels or the one documented error, whatever the bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.decode import decode
from pipelines.data.formats import common
from pipelines.data.headers import read_header
from pipelines.data.plain_jpeg import plain_jpeg
from pipelines.data.scan import scan
from pipelines.errors import DataError
from tests.oddities import good_files
from tools.fuzz import changed

ROUNDS = 30  # of each file: 1,300 files in all
MAX_PIXELS = 1_000_000  # a header with another size then costs little


def mutated(index: int, data: bytes, round_: int) -> bytes:
    # the rest is padding behind the image or a profile
    return changed(data[:4000], random.Random(f"{index} {round_}"))


def outcome(read: Callable[[], object]) -> object:
    """What `read` returns, or the message of its DataError. Nothing else may be raised."""
    try:
        return read()
    except DataError as error:
        return str(error)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_PIXELS", MAX_PIXELS)


@pytest.mark.timeout(300)
def test_no_bytes_give_anything_but_pixels_or_an_error(tmp_path: Path) -> None:
    """Whatever the bytes of a file, it is an image or one line that says why not."""
    path, descriptors, images = tmp_path / "x\x1b.jpg", len(os.listdir("/dev/fd")), 0
    for index, file in enumerate(good_files()):
        for round_ in range(ROUNDS):
            data = mutated(index, file.data, round_)
            path.write_bytes(data)
            plain_jpeg(data)
            size = outcome(lambda: read_header(str(path)))
            pixels = outcome(lambda data=data: decode(data, str(path)))
            if isinstance(pixels, np.ndarray):
                images += 1
                assert pixels.dtype == np.uint8
                assert pixels.shape[2:] == (3,)
                assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
                assert isinstance(size, str) or size == pixels.shape[:2], (file.name, round_)
            else:
                assert isinstance(pixels, str)
                assert pixels.isprintable()  # and so one line
                assert "is not a usable image: " in pixels
    assert images > 100
    assert len(os.listdir("/dev/fd")) == descriptors


@pytest.mark.timeout(120)
def test_a_scan_of_damaged_files_ends_with_a_reason_for_each(tmp_path: Path) -> None:
    """A scan gives every damaged file a size or a reason, and reads on."""
    paths = []
    for index, file in enumerate(good_files()):
        paths.append(str(tmp_path / f"{index}.jpg"))
        Path(paths[-1]).write_bytes(mutated(index, file.data, ROUNDS))
    scanned = scan(paths, (), workers=0)
    bad = {row for row, _ in scanned.bad}
    assert bad
    assert [row in bad for row in range(len(paths))] == (scanned.sizes.min(axis=1) == 0).tolist()
    assert all(reason.isprintable() and "is not a usable image: " in reason for _, reason in scanned.bad)
