"""Symbolic links in folders that came from elsewhere: nothing is written through them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.metrics import MetricsWriter
from pipelines.files import open_to_append, read_file, write_atomically
from tests.commands.test_cli import TINY as SMALL

TINY = [*SMALL, "--cpu-threads", "1"]

PRECIOUS = b"precious"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(16):
        Image.fromarray(np.full((24, 24, 3), 10 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


@pytest.mark.parametrize("shared", [False, True])
def test_a_link_of_either_name_is_replaced(shared: bool, tmp_path: Path, target: Path) -> None:
    """A file is written beside a link of its name or of its temporary name, and takes the link's place."""
    for name in ("file", "file.tmp"):
        (tmp_path / name).symlink_to(target)
    write_atomically(tmp_path / "file", "content", shared=shared)
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "content"
    assert target.read_bytes() == PRECIOUS


def test_only_regular_files_are_appended_to_or_read(tmp_path: Path, target: Path) -> None:
    """A pipe, a device or a folder in place of a file is an error at once, and a link is not appended to."""
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "device", "folder", "pipe"):
        with pytest.raises(OSError, match=f"{name}'"):
            open_to_append(tmp_path / name)
    for name in ("device", "folder", "pipe"):
        with pytest.raises(OSError, match=f"{name}'"):
            read_file(tmp_path / name)
    assert target.read_bytes() == PRECIOUS


NAMES = ("status.json", "metrics.jsonl", "curves.png", "backbone.safetensors", "config.json")


def test_a_resumed_run_writes_through_no_link(shapes_run: Path, tmp_path: Path, target: Path) -> None:
    """Files of a run folder that are links, or have links for temporary files, are replaced when the run is resumed."""
    run = tmp_path / "run"
    shutil.copytree(shapes_run, run)
    for name in (*(f"{name}.tmp" for name in NAMES), "curves.png", "backbone.safetensors"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
    assert main(["train", "--resume", "--out", str(run)]) == ExitCode.DONE
    assert target.read_bytes() == PRECIOUS
    assert not (run / "curves.png").is_symlink()
    assert not (run / "backbone.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (".lock", ExitCode.CONFIG),
        ("checkpoints", ExitCode.CONFIG),
        ("tb", ExitCode.CONFIG),
    ],
)
def test_a_run_whose_parts_are_links_is_not_resumed(
    name: str, code: ExitCode, shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder whose lock or sub-folder is a link to elsewhere is refused, and nothing is written there."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(shapes_run, run)
    if (run / name).is_dir():
        (run / name).rename(elsewhere)
    elif name == ".lock":
        (run / name).unlink()
        elsewhere.write_bytes(b"")
    else:
        elsewhere.mkdir()
    (run / name).symlink_to(elsewhere)
    assert main(["train", "--resume", "--out", str(run)]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run}/{name}" in error
    assert "symbolic link" in error
    if name == ".lock":
        assert elsewhere.read_bytes() == b""


def test_metrics_that_are_a_link_become_a_file(tmp_path: Path) -> None:
    """If metrics.jsonl of a resumed run is a link, the run goes on in a copy; a link made later is not written to."""
    elsewhere, path = tmp_path / "elsewhere.jsonl", tmp_path / "metrics.jsonl"
    line = b'{"step": 1, "epoch": 0}\n'
    elsewhere.write_bytes(line)
    path.symlink_to(elsewhere)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert writer.truncate_after(1) == 0
    assert path.read_bytes() == line
    assert not path.is_symlink()
    path.unlink()
    path.symlink_to(elsewhere)
    warning = writer.write(2, 0)
    assert warning is not None
    assert "metrics.jsonl cannot be written now (it is a symbolic link)" in warning
    assert elsewhere.read_bytes() == line


def test_pictures_and_evaluations_write_through_no_link(
    shapes_run: Path, photos: Path, tmp_path: Path, target: Path
) -> None:
    """A link with the name of a picture or of a file of an evaluation is replaced, and what it leads to stays."""
    out, cache = tmp_path / "out", ["--data-root", str(tmp_path / "cache"), "--device", "cpu"]
    out.mkdir()
    for name in ("eval.json", "eval.json.tmp", "retrieval.png", "views.png", "views.png.tmp"):
        (out / name).symlink_to(target)
    views = ["views", str(photos), "-o", str(out / "views.png"), "--count", "2", "--crop-size", "16"]
    assert main([*views, *cache]) == ExitCode.DONE
    evaluation = ["eval", str(shapes_run), "--data", str(photos), "--out", str(out), "--workers", "0", *cache]
    assert main([*evaluation, "--cpu-threads", "1"]) == ExitCode.DONE
    assert target.read_bytes() == PRECIOUS
    for name in ("eval.json", "retrieval.png", "views.png"):
        assert not (out / name).is_symlink()


def test_the_folder_of_an_evaluation_in_a_run_is_no_link(
    shapes_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fastmoco eval` does not follow a link named eval in a run folder; a folder is to be named with --out."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(shapes_run, run)
    elsewhere.mkdir()
    (run / "eval").symlink_to(elsewhere)
    cache = ["--data-root", str(tmp_path / "cache"), "--device", "cpu"]
    assert main(["eval", str(run), "--data", str(photos), "--workers", "0", *cache]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert f"{run}/eval is a symbolic link" in error
    assert error.count("\n") == 1
    assert list(elsewhere.iterdir()) == []
