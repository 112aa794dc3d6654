"""Output that would be in the folder of images: refused, since the next run would train on its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from tests.commands.test_cli import TINY as SMALL

TINY = [*SMALL, "--cpu-threads", "1"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders, of which one is a link to a folder elsewhere."""
    root = tmp_path / "photos"
    for name in ("photos/fox", "elsewhere/owls"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((16, 16, 3), 20 * i, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    (root / "owl").symlink_to(tmp_path / "elsewhere" / "owls")
    return root


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str | Path]) -> None:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is in the folder of images" in error
    assert "choose another with --out" in error


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.name.startswith("."))


@pytest.mark.parametrize(
    "out", ["photos", "photos/runs/1", "photos/fox", "link/runs", "elsewhere/owls/run", "photos/owl/r"]
)
def test_a_run_in_its_own_data_is_refused(
    out: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out in the folder of --data is refused, also if a link leads there, and nothing is written."""
    (tmp_path / "link").symlink_to(photos)
    before = files(tmp_path)
    refused(capsys, ["train", *TINY, "--data", photos, "--out", tmp_path / out])
    assert files(tmp_path) == before


def test_the_default_folder_is_refused_in_the_data_too(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run started in its folder of images, without --out, would be below it and is refused."""
    monkeypatch.chdir(photos)
    refused(capsys, ["train", *TINY, "--data", "."])
    refused(capsys, ["views", ".", "--device", "cpu"])
    assert not (photos / "runs").exists()
    assert not (photos / "views.png").exists()


def test_beside_the_data_is_no_error(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside the images, in the folder of a list of images, or named like a data set is accepted."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--data", str(photos), "--out", "photos-runs"]) == ExitCode.DONE
    (photos / "list.txt").write_text("".join(f"{kind}/{i}.png\n" for kind in ("fox", "owl") for i in range(8)))
    assert main(["train", *TINY, "--data", str(photos / "list.txt"), "--out", str(photos / "run")]) == ExitCode.DONE
    (tmp_path / "shapes").mkdir()
    assert main(["train", *TINY, "--data", "shapes", "--out", "shapes/run"]) == ExitCode.DONE


def test_an_evaluation_in_its_data_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures of an evaluation are not written into the folder of images."""
    assert main(["train", *TINY, "--crop-size", "16", "--out", str(tmp_path / "run")]) == ExitCode.DONE
    cache = ["--data-root", tmp_path / "cache", "--device", "cpu", "--workers", "0"]
    refused(capsys, ["eval", tmp_path / "run", "--data", photos, "--out", photos / "eval", *cache])
    assert not (photos / "eval").exists()
