"""Damaged images of every format: pixels or the one documented error, whatever the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import decode as decoding
from pipelines.data.decode import decode
from pipelines.data.headers import read_header
from pipelines.data.plain_jpeg import plain_jpeg
from pipelines.data.scan import scan
from pipelines.errors import DataError
from tests.oddities import good_files

ROUNDS = 30  # of each file: 1,300 files in all
MAX_PIXELS = 1_000_000  # a header with another size then costs little

Random = np.random.Generator


def flip(data: bytearray, random: Random) -> None:
    for at in random.integers(0, len(data), random.integers(1, 9)):
        data[at] ^= 1 << random.integers(0, 8)


def flip_in_header(data: bytearray, random: Random) -> None:
    for at in random.integers(0, min(64, len(data)), random.integers(1, 4)):
        data[at] = random.integers(0, 256)


def cut(data: bytearray, random: Random) -> None:
    del data[random.integers(0, len(data)) :]


def remove(data: bytearray, random: Random) -> None:
    start = random.integers(0, len(data))
    del data[start : start + random.integers(1, 200)]


def repeat(data: bytearray, random: Random) -> None:
    start = random.integers(0, len(data))
    data[start:start] = data[start : start + random.integers(1, 200)]


def erase(data: bytearray, random: Random) -> None:
    start = random.integers(0, len(data))
    length = min(int(random.integers(1, 64)), len(data) - start)
    data[start : start + length] = bytes([random.choice([0x00, 0xFF])]) * length


MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (flip, flip_in_header, cut, remove, repeat, erase)


def mutated(index: int, data: bytes, round_: int) -> bytes:
    random = np.random.Generator(np.random.Philox(key=[index, round_]))
    changed = bytearray(data[:4000])  # the rest is padding behind the image or a profile
    for _ in range(random.integers(1, 3)):
        if changed:
            MUTATIONS[random.integers(len(MUTATIONS))](changed, random)
    return bytes(changed)


def outcome(read: Callable[[], object]) -> object:
    """What `read` returns, or the message of its DataError. Nothing else may be raised."""
    try:
        return read()
    except DataError as error:
        return str(error)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", MAX_PIXELS)


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
