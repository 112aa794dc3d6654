"""Names from the data are literal text in the page, and damaged files cost no more than what they held."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.console import Fact
from fastmoco.errors import ExitCode
from tests.report_page.parsed_page import page_of
from tests.report_page.sample_run import write_run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $x_1$ {{ 7*7 }} \x1b[31m \u202e"


def test_names_are_literal_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a<b>&\"x' \xff $y_2$")
    run = write_run(folder, message=HOSTILE, facts=(Fact(HOSTILE, HOSTILE, HOSTILE),), settings={"data": (HOSTILE,)})
    content = json.loads((run / "eval" / "eval.json").read_text())
    content["probes"][0]["probe"] = content["data"]["images"] = HOSTILE
    (run / "eval" / "eval.json").write_text(json.dumps(content))
    for page in (page_of(run), page_of(run, write_run(tmp_path / "$z_3$<i>"))):
        assert page.text.count("<script>alert(1)</script>") >= 4
        assert "{{ 7*7 }}" in page.text
        assert "\\x1b[31m" in page.text
        assert "\x1b" not in page.text
        assert "\u202e" not in page.text
        assert not any("onerror" in attributes for _, attributes in page.elements)


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "views.png").write_bytes((run / "views.png").read_bytes()[:1000])
    (run / "eval" / "retrieval.png").write_text("no picture")
    (run / "eval" / "eval.json").write_text('{"probes": [1]}')
    (run / "start.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": "many"}\nnonsense\n{"step": 50, "ep')
    page = page_of(run)
    assert "2 lines of metrics.jsonl could not be read and are left out." in page.text
    assert "views.png is damaged and left out." in page.text
    assert "eval/retrieval.png is damaged and left out." in page.text
    assert "eval/eval.json is damaged" in page.text
    assert "kNN top-1 60.0 %" in page.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "RUN is no folder: expected that of a run, such as runs/NAME"),
        ("file", "RUN is no folder: expected that of a run, such as runs/NAME"),
        ("empty", "RUN has no config.json: expected the folder of a run"),
        ("no config", "RUN has no config.json: expected the folder of a run"),
        ("runs", "RUN has no config.json: it has runs in it: fastmoco report RUN/*"),
        ("config", "RUN/config.json: the configuration is not valid JSON ("),
        ("unknown field", "RUN/config.json: the configuration has no field 'arhc'; did you mean 'arch'?"),
    ],
)
def test_what_is_no_run_is_one_line_and_an_exit_code(
    tmp_path: Path, damage: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if damage == "file":
        run.write_text("")
    elif damage == "empty":
        run.mkdir()
    elif damage != "absent":
        write_run(run / "inner" if damage == "runs" else run)
    if damage == "no config":
        (run / "config.json").unlink()
    if damage in ("config", "unknown field"):
        (run / "config.json").write_text("{" if damage == "config" else '{"model": {"arhc": "resnet18"}}')
    assert main(["report", str(run)]) == ExitCode.CONFIG
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"fastmoco: error: {message.replace('RUN', str(run))}")
    assert output.err.count("\n") == 1
    assert not (run / "report.html").exists()
