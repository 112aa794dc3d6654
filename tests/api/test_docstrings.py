"""The examples in the docstrings of what `from fastmoco import ...` gives run as they are written, in this order."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import fastmoco
from tests.oddities import encode, picture

ORDER = ("train", "Run", "evaluate", "export", "load_backbone", "open_images", "embed")


def test_every_public_name_has_an_example() -> None:
    assert sorted(ORDER) == fastmoco.__all__
    for name in ORDER:
        assert ">>> " in (getattr(fastmoco, name).__doc__ or ""), name


@pytest.mark.slow
def test_the_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(16):
            pixels = np.roll(picture(40, 48), 3 * i + len(name), axis=1)
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(encode(pixels, "PNG"))
    monkeypatch.chdir(tmp_path)
    for module in ("fastmoco.api.functions", "fastmoco.commands.eval"):  # what they print is not in the examples
        monkeypatch.setattr(f"{module}.make_console", lambda **_: Console(quiet=True))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for name in ORDER:
        (example,) = doctest.DocTestFinder(recurse=False).find(getattr(fastmoco, name), name, globs={})
        assert example.examples
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
