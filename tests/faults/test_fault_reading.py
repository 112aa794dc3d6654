"""Files that are no images any more when they are read: endless, pipes, devices, and on disks that do not answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from pipelines import reads
from pipelines.augment.presets import V1
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from pipelines.data.quarantine import FILE_NAME, Ledger
from pipelines.errors import DataError
from pipelines.plan.planner import Planner
from tests.oddities import encode, picture

CPU = torch.device("cpu")
TINY = ["--batch-size", "8", "--bn-splits", "2", "--moco-k", "8", "--width", "0.125", "--epochs", "1", "--cpu-threads"]
TINY += ["1", "--arch", "resnet18", "--crop-size", "8", "--amp", "fp32", "--device", "cpu", "--workers", "0"]
BACKENDS = ["torch", "resident", "dali", "dataloader"]
SLOW_READERS = ("index", "scan", "scan-workers", "worker")  # each starts Python anew
HUNG_DISK = Path(__file__).with_name("hung_disk.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "f").mkdir()
    for i in range(16):
        (tmp_path / "f" / f"{i:02}.jpg").write_bytes(encode(picture(20 + i, 30), "JPEG"))
    return tmp_path / "f"


def endless(path: Path) -> None:
    """A terabyte that takes no space."""
    path.write_bytes(b"")
    os.truncate(path, 2**40)


def hollow(path: Path) -> None:
    """A JPEG with a hole of 12 GiB before its last marker."""
    os.truncate(path, 12 * 2**30)
    with path.open("ab") as file:
        file.write(b"\xff\xd9")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


# ---- when the data set is indexed ------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("spoil", [endless, hollow, device])
@pytest.mark.parametrize("command", ["train", "scan"])
def test_a_file_too_long_for_an_image_is_refused_before_it_is_read(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is longer than any image, or a device, is exit code 3 with its name, without being read."""
    spoil(folder / "07.jpg")
    arguments = ["train", *TINY, "--data", str(folder), "--out", str(tmp_path / "run")]
    before = descriptors()
    assert main(arguments if command == "train" else ["scan", str(folder), "--workers", "0"]) == ExitCode.DATA
    output = capsys.readouterr()
    message = output.err + output.out
    reason = "it is a device, expected a regular file" if spoil is device else "more than the limit of 712,000,000"
    assert "07.jpg" in message
    assert reason in " ".join(message.split())
    assert output.err.count("\n") == 1
    assert "Traceback" not in message
    assert descriptors() == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("spoil", [endless, hollow, device])
def test_a_file_too_long_for_an_image_is_quarantined(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """With `--bad-images quarantine`, a file that is too long or a device is left out and listed."""
    spoil(folder / "07.jpg")
    out = tmp_path / "run"
    arguments = ["--data", str(folder), "--out", str(out), "--bad-images", "quarantine"]
    assert main(["train", *TINY, *arguments]) == ExitCode.DONE
    assert "07.jpg" in (out / FILE_NAME).read_text()


# ---- while training --------------------------------------------------------------------------------------------------


def views_of(index: ImageIndex, name: str) -> list[torch.Tensor]:
    planner = Planner(index.sizes, seed=0, batch_size=len(index), augmentation=V1, shuffle_keys=False)
    source = open_source(name, index, 8, CPU, 1)
    pipeline = open_pipeline(name, index, planner, source, 8, CPU, torch.float32, 1)
    try:
        return [views.query for views in pipeline.views(0, 1)]
    finally:
        pipeline.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("spoil", [endless, hollow, pipe, device])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_image_that_becomes_a_pipe_or_endless_is_named(
    folder: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None], require_backend: Callable[[str], None]
) -> None:
    """An image that becomes a pipe, a device or endless while training is an error with its name, on every backend."""
    if name == "dali":
        require_backend("dali")
    index = load_dataset(str(folder), data_root=tmp_path).train
    spoil(folder / "07.jpg")
    with pytest.raises(DataError, match=r"07\.jpg .*(limit|expected a regular file)"):
        views_of(index, name)
    assert active_children() == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BACKENDS)
def test_an_image_that_becomes_a_pipe_is_quarantined(
    folder: Path, tmp_path: Path, name: str, require_backend: Callable[[str], None]
) -> None:
    """With `--bad-images quarantine`, an image that becomes a pipe while training is replaced by grey and listed."""
    if name == "dali":
        require_backend("dali")
    ledger = Ledger(str(tmp_path / FILE_NAME), most=1)
    index = load_dataset(str(folder), data_root=tmp_path).with_ledger(ledger).train
    pipe(folder / "07.jpg")
    assert len(views_of(index, name)) == 1
    assert [Path(entry.image).name for entry in ledger.entries()] == ["07.jpg"]


# ---- a disk that does not answer -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or getattr(os, "geteuid", lambda: 1)() != 0,
    reason="only root mounts a disk that does not answer",
)
@pytest.mark.parametrize("reader", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_READERS)])
def test_a_read_that_never_returns_ends_the_command(folder: Path, tmp_path: Path, reader: str) -> None:
    """A disk or network mount that no longer answers is exit code 3 with the file's name, not a hang."""
    command = ["unshare", "-m", sys.executable, str(HUNG_DISK), reader, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == ExitCode.DATA, done.stderr
    assert f"reading {folder}/07.jpg has taken more than 5 s: check that its disk" in done.stderr
    assert "Traceback" not in done.stderr
    if reader == "train":
        assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == ExitCode.DATA


def test_a_suspended_process_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read counts only while the process runs: one that was suspended for an hour goes on."""
    lines: list[str] = []
    ended = threading.Event()

    def stuck(line: str) -> None:
        lines.append(line)
        ended.set()

    now = time.monotonic()
    with monkeypatch.context() as an_hour_ago:
        an_hour_ago.setattr(time, "monotonic", lambda: now - 3600)
        read = reads.Timed("image.jpg")
        read.__enter__()
    watched = reads.watch(1.0, stuck)
    try:
        assert not ended.wait(0.5)
        assert ended.wait(30)
    finally:
        watched.set()
        read.__exit__()
    assert lines[0].startswith("reading image.jpg has taken more than 1 s")


def test_reads_that_end_are_not_stuck() -> None:
    """Many short reads, one after another, are no long one."""
    lines: list[str] = []
    watched = reads.watch(1.0, lines.append)
    for i in range(60):
        with reads.Timed(f"{i}.jpg"):
            time.sleep(0.02)
    watched.set()
    assert lines == []


# ---- lists of paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["b\0.jpg", "b.jpg\tcat\0"])
def test_a_nul_byte_late_in_a_list_is_named(
    folder: Path, tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A NUL byte anywhere in a list of paths is exit code 3 with the number of its line."""
    lines = ["f/01.jpg\tdog" if "\t" in line else "f/01.jpg"] * 1000
    (tmp_path / "list.txt").write_text("\n".join([*lines, line]))
    arguments = ["--data", str(tmp_path / "list.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", *TINY, *arguments]) == ExitCode.DATA
    message = capsys.readouterr().err
    assert "line 1001 of" in message
    assert "list.txt" in message
    assert message.count("\n") == 1


def test_a_list_that_is_endless_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of paths that is longer than any list is exit code 3 before it is read."""
    path = tmp_path / "list.txt"
    path.write_text("f/01.jpg\n" * 1000)
    os.truncate(path, 2**40)
    assert main(["train", *TINY, "--data", str(path), "--out", str(tmp_path / "run")]) == ExitCode.DATA
    assert "more than the limit of 1,073,741,824" in capsys.readouterr().err
