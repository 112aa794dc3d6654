"""From the last line of a run to its page, through the files that training really writes."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.start_record import read_start
from tests.report_page.parsed_page import checked

TINY = "train shapes --limit 32 --batch-size 8 --moco-k 16 --width 0.125 --arch resnet18 --crop-size 8 --amp fp32 "
TINY += "--knn-k 5 --knn-every 1 --log-every 1 --device cpu --workers 1 --cpu-threads 1 --pipeline resident"


def test_the_last_line_of_a_run_names_the_command_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY.split(), "--epochs", "1", "--out", "a run"]) == ExitCode.DONE
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "fastmoco report 'a run' shows all of it on one page"
    start = read_start(tmp_path / "a run")
    assert start is not None
    reasons = {fact.name: fact.why for fact in start.facts if fact.why}
    assert reasons["stem"] == "crops of 8 pixels"

    assert main(["train", "--resume", "a run", "--epochs", "2"]) == ExitCode.DONE
    resumed = read_start(tmp_path / "a run")
    assert resumed is not None
    assert {fact.name: fact.why for fact in resumed.facts}["stem"] == "crops of 8 pixels"

    assert main(shlex.split(last)[1:3]) == ExitCode.DONE
    page = checked((tmp_path / "a run" / "report.html").read_text(encoding="utf-8"))
    assert "8 of 8 steps, 2 epochs" in page.text
    assert "stem cifar crops of 8 pixels" in page.text
    assert f"chance {math.log(17):.2f}" in page.text
    assert len(page.all("img")) == 1
