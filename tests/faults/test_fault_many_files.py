"""What many tiny files cost, counted rather than timed."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmoco.run.data_record import SAMPLE, take
from pipelines.data.dataset import load_dataset
from tests.oddities import encode, picture

COUNT = 1_000
OTHERS = 100  # calls for folders and modules, and by other threads
CALLS = ("open", "read", "pread", "fstat", "stat", "lseek", "close")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to one image in two classes."""
    root = tmp_path_factory.mktemp("many")
    (root / "image").write_bytes(encode(picture(32, 32), "JPEG"))
    for i in range(COUNT):
        path = root / "images" / f"class-{i % 2}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(root / "image", path)
        except OSError:  # a file system without links
            shutil.copyfile(root / "image", path)
    return root / "images"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of calls of each function of `os` that is a system call."""
    counted: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return function(*arguments, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return counted


def test_a_tiny_file_is_indexed_with_four_system_calls(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    """Indexing opens each of many tiny files once and reads it once."""
    dataset = load_dataset(str(folder), data_root=tmp_path)
    assert len(dataset.train) == COUNT
    for name in ("open", "fstat", "pread", "close"):
        assert COUNT <= calls[name] < COUNT + OTHERS, name
    assert calls["read"] + calls["lseek"] + calls["stat"] < OTHERS


def test_a_run_asks_the_time_of_each_file_once(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    """The record of a run's images asks for the time of each file once, and opens a fixed number of them."""
    images = load_dataset(str(folder), data_root=tmp_path).train
    calls.clear()
    assert take(images) is not None
    assert COUNT <= calls["stat"] < COUNT + OTHERS
    assert SAMPLE <= calls["open"] < SAMPLE + OTHERS


def test_an_index_of_many_files_takes_little_memory(folder: Path, tmp_path: Path) -> None:
    """The index of many files takes less than a kilobyte of memory per file."""
    load_dataset(str(folder), data_root=tmp_path)  # imports and caches
    tracemalloc.start()
    try:
        dataset = load_dataset(str(folder), data_root=tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset.train) == COUNT
    assert kept < 400 * COUNT
    assert peak < 1_000 * COUNT + 2_000_000  # and the heads of the files that are open at a time
