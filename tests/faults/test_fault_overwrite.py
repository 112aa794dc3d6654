"""--overwrite deletes what a run wrote, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.overwrite import foreign_entry
from pipelines.data.quarantine import FILE_NAME as LEDGER_NAME
from tests.commands.test_cli import TINY as SMALL
from tests.commands.test_cli import snapshot

TINY = [*SMALL, "--cpu-threads", "1"]


def train(out: Path, *flags: str) -> int:
    return main(["train", *TINY, *flags, "--out", str(out)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "A"
    assert train(out) == ExitCode.DONE
    return out


@pytest.mark.parametrize(
    "foreign",
    [
        "photos/1.jpg",
        "b/config.json",
        "notes.txt",
        "checkpoints/best.pth",
        "eval/mine.csv",
        "tb/other/x",
        "config.json/x",
    ],
)
def test_overwrite_deletes_nothing_that_no_run_wrote(
    foreign: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite refuses a run folder with anything else in it, such as photos or another run, and names it."""
    run = tmp_path / "A"
    shutil.copytree(finished, run)
    path = run / foreign
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    before = snapshot(run)
    assert train(run, "--overwrite") == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(run / foreign.split("/")[0]) in error
    assert "no run wrote" in error
    assert snapshot(run) == before


def test_overwrite_replaces_a_run_with_all_its_files(finished: Path, tmp_path: Path) -> None:
    """--overwrite deletes whatever a run and its evaluation write, leftovers of a killed process included."""
    run = tmp_path / "A"
    shutil.copytree(finished, run)
    names = (LEDGER_NAME, "eval/eval.json", "eval/confusion-few-label.csv", "tb/events.out.tfevents.1.host.2.0")
    names += ("checkpoints/step-000000009.safetensors.sha256.tmp", "status.json.tmp", "eval/retrieval.png.89abcdef.tmp")
    for name in names:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("")
    assert foreign_entry(run) is None
    assert train(run, "--overwrite") == ExitCode.DONE
    assert snapshot(run).keys() == snapshot(finished).keys()
