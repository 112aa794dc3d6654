"""Standard output whose reader goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.directory import read_status
from tests.commands.test_cli import TINY
from tests.oddities import fill

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


def test_a_run_goes_on_if_the_reader_of_its_log_ends(broken_pipe: None, tmp_path: Path) -> None:
    """A run whose log is read by a program that ends, such as `tee` or `head`, trains to its end."""
    assert main(["train", *TINY, "--cpu-threads", "1", "--out", str(tmp_path / "run")]) == ExitCode.DONE
    assert read_status(tmp_path / "run")["state"] == "done"
    assert (tmp_path / "run" / "backbone.safetensors").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ["recipes"],
        ["recipes", "shapes"],
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["sweep", "-h"],
        ["eval", "-h"],
    ],
    ids=" ".join,
)
def test_output_that_nobody_reads_is_no_error(
    broken_pipe: None, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """A command whose output is cut off by `head` prints no traceback."""
    assert main(command) == ExitCode.DONE
    assert capsys.readouterr().err == ""


def test_a_command_without_a_reader_writes_its_files_and_keeps_its_exit_code(broken_pipe: None, tmp_path: Path) -> None:
    """A scan or an evaluation whose output is cut off by `head` writes its files, and exits as it would have."""
    folder = fill(tmp_path / "data", *(f"{i}.png" for i in range(8)))
    assert main(["views", str(folder), "--crop-size", "8", "-o", str(tmp_path / "v.png")]) == ExitCode.DONE
    assert (tmp_path / "v.png").is_file()
    (folder / "x.jpg").write_bytes(b"<html>")
    assert main(["scan", str(folder), "--workers", "0"]) == ExitCode.DATA
    assert (folder / ".fastmoco-manifest.npz").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command", ["-m fastmoco train --help", "-m fastmoco recipes", "tools/make_ffcv.py -h", "tools/make_shards.py -h"]
)
def test_a_pipe_into_head_is_exit_code_0(command: str, buffered: bool, tmp_path: Path) -> None:
    """A program whose output is read by `head`, with and without PYTHONUNBUFFERED."""
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *(str(ROOT / word) if word.startswith("tools") else word for word in command.split())]
    done = subprocess.run(
        line, stdout=write, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
