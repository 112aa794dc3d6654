"""Converters on a full disk, with links in their way, and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.beton import read_index
from pipelines.data.beton_writer import BetonWriter
from pipelines.data.dataset import load_dataset
from pipelines.data.shard_writer import ShardWriter
from pipelines.errors import DataError
from tests.oddities import encode, picture
from tests.small_disk import fill, small_disk
from tools import make_ffcv, make_shards

REPOSITORY = Path(__file__).parents[2]
CONVERTERS: dict[str, Callable[[list[str]], int]] = {"out.beton": make_ffcv.main, "out": make_shards.main}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of 20 images that cannot be compressed, 150 kB as JPEGs."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 48, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i:02}.jpg").write_bytes(encode(pixels, "JPEG", quality=90))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 2**19) as disk:
        yield disk


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_disk_without_room_is_seen_before_converting(data, disk, capsys, name):
    """A converter that has no room says at once how many bytes it needs, where, and how many are free."""
    fill(disk, leave_bytes=2**16)
    out = disk / name
    assert CONVERTERS[name]([str(data), str(out)]) == 3
    error = capsys.readouterr().err
    assert f"cannot write {out} (No space left on device: at least 1" in error
    assert "more bytes are needed and 65,536 are free), and nothing is left of it: make room, or" in error
    assert names(disk) == {"filler"}


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_disk_that_fills_while_converting_keeps_nothing(data, disk, capsys, monkeypatch, name):
    """Wherever a disk fills while a converter writes, nothing is left, and the next try works once there is room."""
    for tool in (make_ffcv, make_shards):
        monkeypatch.setattr(tool, "check_space", lambda *_: None)  # as if another program filled it meanwhile
    codes, out, flags = set(), disk / name, [] if name == "out.beton" else ["--shard-mib", "0.05"]
    for pages in (0, 1, 2, 3, 10, 30, 60, 61, 62, 63, 64):
        filler = fill(disk, leave_bytes=4096 * pages)
        codes.add(code := CONVERTERS[name]([str(data), str(out), *flags]))
        error = capsys.readouterr().err
        if code == 3:
            assert names(disk) == {"filler"}, pages
            assert f"cannot write {out} (No space left on device: " in error
            assert "bytes are needed and" in error
            assert "Traceback" not in error
        else:
            break
        filler.unlink()
    filler.unlink()
    assert codes == {0, 3}
    assert len(load_dataset(str(out), data_root=".").train) == 40


@pytest.mark.parametrize("leftover", ["link", "hard link", "file"])
def test_nothing_is_written_through_a_link(data, tmp_path, leftover):
    """A link with the temporary name of a converter is removed, and what it points to stays as it was."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("out.beton.partial", "out.beton.json.tmp", "out.part"):
        if leftover == "link":
            (tmp_path / name).symlink_to(victim)
        elif leftover == "hard link":
            (tmp_path / name).hardlink_to(victim)
        else:
            (tmp_path / name).write_bytes(b"half")
    for name, convert in CONVERTERS.items():
        assert convert([str(data), str(tmp_path / name)]) == 0
        assert len(load_dataset(str(tmp_path / name), data_root=".").train) == 40
    assert victim.read_bytes() == b"precious"
    assert names(tmp_path) == {"victim", "out", "out.beton", "out.beton.json"}


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_link_in_place_of_the_result_is_refused(data, tmp_path, capsys, name):
    """A link with the name of the result is neither followed nor replaced."""
    (tmp_path / "target").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "target")
    assert CONVERTERS[name]([str(data), str(tmp_path / name)]) in (2, 3)
    assert "choose another name" in capsys.readouterr().err
    assert names(tmp_path / "target") == set()
    assert names(tmp_path) == {"target", name}


def test_a_manifest_of_something_else_is_not_removed(data, tmp_path, capsys):
    """A file that is not a converter's own leftover is never deleted, whatever its name."""
    (tmp_path / "out.beton.json").write_text('{"mine": 1}')
    assert make_ffcv.main([str(data), str(tmp_path / "out.beton")]) == 3
    assert "out.beton.json exists; remove it, or choose another name" in capsys.readouterr().err
    assert names(tmp_path) == {"out.beton.json"}


def test_one_converter_writes_to_a_name_at_a_time(data, tmp_path, capsys):
    """A second converter to the same name is refused, and the first is not disturbed."""
    with BetonWriter(str(tmp_path / "out.beton"), 1, 10), ShardWriter(tmp_path / "out", 100) as shards:
        for name, convert in CONVERTERS.items():
            assert convert([str(data), str(tmp_path / name)]) == 3
            assert "another process is writing" in capsys.readouterr().err
        assert names(tmp_path) == {"out.beton.partial", "out.part"}
        shards.add(".jpg", encode(picture(), "JPEG"), picture().shape[:2], None)
        shards.finish(())
    assert names(tmp_path) == {"out"}


CONVERT = """
import os, signal, sys
from tools import make_ffcv, make_shards
from pipelines.data.beton_writer import BetonWriter
from pipelines.data.shard_writer import ShardWriter

def stop_at_20(writer):
    add, count = writer.add, [0]
    def counted(*arguments):
        add(*arguments)
        count[0] += 1
        if count[0] == 20:
            os.kill(os.getpid(), getattr(signal, stopped_by))
    return counted

for kind in (BetonWriter, ShardWriter):
    enter = kind.__enter__
    def entered(self, enter=enter):
        self.add = stop_at_20(self)
        return enter(self)
    kind.__enter__ = entered
for stopped_by in ("SIGKILL", "SIGTERM"):
    for name, main in (("out.beton", make_ffcv.main), ("out", make_shards.main)):
        child = os.fork()
        if child == 0:
            sys.exit(main([sys.argv[1], f"{stopped_by}/{name}"]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_what_a_stopped_converter_leaves_is_removed(data, tmp_path):
    """A converter that is asked to stop leaves nothing, and what a killed one leaves is removed by the next try."""
    for name in ("SIGKILL", "SIGTERM"):
        (tmp_path / name).mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", CONVERT, str(data)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["-9", "-9", "75", "75"], done.stderr
    assert names(tmp_path / "SIGTERM") == set()
    assert names(tmp_path / "SIGKILL") == {"out.beton.partial", "out.part"}
    for name, convert in CONVERTERS.items():
        assert convert([str(data), str(tmp_path / "SIGKILL" / name)]) == 0
    assert names(tmp_path / "SIGKILL") == {"out", "out.beton", "out.beton.json"}
    assert len(read_index(str(tmp_path / "SIGKILL" / "out.beton"))) == 40


def test_class_names_that_archives_cannot_hold_are_refused(tmp_path, capsys):
    """A class whose name has a line break is refused by the converter, rather than by whoever reads its archives."""
    for name in ("a", "b\u2028c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.jpg").write_bytes(encode(picture(), "JPEG"))
    assert make_shards.main([str(tmp_path / "data"), str(tmp_path / "out")]) == 3
    assert "the names of its classes have line breaks" in capsys.readouterr().err
    assert names(tmp_path) == {"data"}


@pytest.mark.parametrize("bad_images", ["error", "quarantine"])
def test_archives_hold_no_image_that_cannot_be_decoded(data, tmp_path, capsys, bad_images):
    """An image that only decoding finds to be bad is refused by make_shards, or left out and named."""
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*sorted(data.rglob("*.jpg")), "bad.png"]))
    png = bytearray(encode(picture(200, 300), "PNG"))
    png[len(png) // 2] ^= 0xFF
    (tmp_path / "bad.png").write_bytes(png)
    code = make_shards.main([str(tmp_path / "list.txt"), str(tmp_path / "out"), "--bad-images", bad_images])
    assert "bad.png" in capsys.readouterr().err
    assert code == (3 if bad_images == "error" else 0)
    assert (tmp_path / "out").exists() == (code == 0)
    if code == 0:
        index = load_dataset(str(tmp_path / "out"), data_root=".").train
        assert [index.read(i).shape for i in range(len(index))] == [(48, 48, 3)] * 40


def test_a_disk_that_loses_bytes_of_an_archive_is_no_success(data, tmp_path, capsys, monkeypatch):
    """make_shards reads again what it wrote: on a disk that loses bytes it fails, and leaves nothing."""
    from pipelines.data import shard_writer

    def lossy(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        add(archive, name, data[:500] + bytes(9) + data[509:] if len(data) > 509 else data)

    add = shard_writer._add
    monkeypatch.setattr(shard_writer, "_add", lossy)
    with pytest.raises(DataError, match="what is read back is not what was written"):
        make_shards.make(make_shards.Settings(data=(str(data),), out=tmp_path / "out"), make_shards.Console(quiet=True))
    assert names(tmp_path) == set()
