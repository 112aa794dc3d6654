"""Standard output whose reader goes away."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.directory import read_status
from tests.commands.test_cli import TINY


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


@pytest.mark.parametrize("command", [["recipes"], ["recipes", "shapes"], ["--help"]], ids=" ".join)
def test_output_that_nobody_reads_is_no_error(
    broken_pipe: None, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """A command whose output is cut off by `head` prints no traceback."""
    main(command)
    assert capsys.readouterr().err == ""
