"""Files with seeded changes: every reader accepts them, or refuses them with its documented error of one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from pipelines.errors import DataError
from tools import fuzz
from tools.fuzz_targets import Target, targets

INPUTS = {"backbone": 40, "checkpoint": 60}
TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_no_file_breaks_its_reader(name, tmp_path):
    """A damaged or hostile file of any kind is refused with one line, and never with a traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decoders
        outcome = fuzz.fuzz(name, TARGETS[name], tmp_path / "read", seed=0, seconds=60, most=INPUTS.get(name, 150))
    assert outcome.failure is None
    assert outcome.tried >= 20
    assert outcome.refused > 0.2 * outcome.tried


def test_the_fuzzer_keeps_what_fails(tmp_path, monkeypatch, capsys):
    """The fuzzer prints an undocumented error, and keeps the file that gave it."""

    def read(path: Path) -> None:
        content = path.read_bytes()
        if content != b"whole file":
            raise (DataError if b"whole" in content else KeyError)("reason")

    monkeypatch.setattr(fuzz, "targets", lambda: {"made-up": Target(lambda _: [b"whole file"], read, (DataError,))})
    assert fuzz.main(["made-up", "--seconds", "20", "--keep", str(tmp_path)]) == 1
    (kept,) = tmp_path.iterdir()
    assert b"whole" not in kept.read_bytes()
    captured = capsys.readouterr()
    assert "KeyError" in captured.err
    assert f"made-up: failed on {kept}" in captured.err
    assert fuzz.main(["nothing"]) == 2
