"""Reading an index's images: all of their bytes, however the system divides them."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.index import ImageIndex, PackedRecords
from pipelines.errors import DataError

CONTENT = bytes(range(256)) * 4


@pytest.fixture(params=["whole", "pieces"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.read` as usual, and as network file systems and signals may shorten it."""
    if request.param == "pieces":
        read = os.read
        monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 77)))


def index_of(path: Path) -> ImageIndex:
    return ImageIndex("test", np.ones((1, 2), dtype=np.int32), paths=(str(path),))


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("length", [0, 1, 76, 77, 78, 1024])
def test_a_file_is_read_whole(tmp_path, length):
    (tmp_path / "image").write_bytes(CONTENT[:length])
    assert index_of(tmp_path / "image").read_bytes(0) == CONTENT[:length]


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_what_cannot_be_read_is_named_and_closed(tmp_path, name):
    (tmp_path / "folder").mkdir()
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(DataError, match=f"cannot read .*{name} "):
            index_of(tmp_path / name).read_bytes(0)
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.usefixtures("reads")
def test_records_are_read_whole_and_no_further(tmp_path):
    path = tmp_path / "images.tar"
    path.write_bytes(CONTENT)
    offsets, lengths = np.array([0, 3, 1000, 1000]), np.array([1, 300, 24, 25])
    records = PackedRecords((str(path),), np.zeros(4, np.int32), offsets, lengths, np.zeros(4, bool), ("a",) * 4)
    assert [records.read(i) for i in range(3)] == [CONTENT[:1], CONTENT[3:303], CONTENT[1000:]]
    with pytest.raises(OSError, match="too short"):
        records.read(3)
