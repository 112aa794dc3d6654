"""Progress of counted work: lines off a terminal, a bar on one, JSON lines or nothing if asked for."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fastmoco.console import FormConsole
from fastmoco.output import Form
from fastmoco.progress import LINE_INTERVAL_S, Counted, reported


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def count(console: Console, steps: int = 4) -> None:
    """1,000 images in 4 steps of 6 s each."""
    clock = Clock()
    with Counted(console, "features of a", 1_000, clock=clock) as progress:
        for step in range(steps):
            clock.now += 6
            progress.advance(250, "1 bad" if step else "")


def test_off_a_terminal_there_is_a_line_at_intervals() -> None:
    assert LINE_INTERVAL_S == 10
    output = io.StringIO()
    count(Console(file=output, width=40))
    assert output.getvalue() == "features of a: 500 of 1,000 images, 42 images/s, 1 bad, 12 s left\n"


def test_what_is_short_prints_nothing() -> None:
    output = io.StringIO()
    count(Console(file=output), steps=1)
    assert output.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_that_disappears() -> None:
    output = io.StringIO()
    count(Console(file=output, force_terminal=True, width=80))
    text = output.getvalue()
    assert "1000/1000" in text
    assert "features of a" in text
    assert text.endswith("\x1b[2K")  # the line is erased


def test_with_json_there_is_an_event_and_with_quiet_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    count(FormConsole(text, Form.JSON))
    assert json.loads(capsys.readouterr().out) == {
        "event": "progress",
        "what": "features of a",
        "unit": "images",
        "done": 500,
        "total": 1_000,
    }
    assert "500 of 1,000" in text.getvalue()
    text = io.StringIO()
    count(FormConsole(text, Form.QUIET))
    assert (text.getvalue(), capsys.readouterr().out) == ("", "")


def test_reports_of_one_split_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.progress.LINE_INTERVAL_S", 0.0)
    output = io.StringIO()
    with reported(Console(file=output, width=80), "reading headers") as report:
        for done, total in ((64, 100), (100, 100), (3, 30), (10, 30)):
            report(done, total)
    lines = output.getvalue().splitlines()
    assert [line.partition(" files")[0] for line in lines] == [
        "reading headers: 64 of 100",
        "reading headers: 3 of 30",
        "reading headers: 10 of 30",
    ]
