"""Output in the folder of images: no data of the next run, and refused where it would be among the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from pipelines.data.dataset import load_dataset
from tests.commands.test_cli import TINY as SMALL

TINY = [*SMALL, "--cpu-threads", "1"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders, of which one is a link to a folder elsewhere."""
    root = tmp_path / "photos"
    for name in ("photos/fox", "elsewhere/owls"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((16, 16, 3), 20 * i, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    (root / "owl").symlink_to(tmp_path / "elsewhere" / "owls")
    return root


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str | Path]) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--out" in error
    return error


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.name.startswith("."))


def images_of(folder: Path) -> list[str]:
    dataset = load_dataset(str(folder), data_root="unused")
    assert dataset.train.class_names == ("fox", "owl")
    assert dataset.train.paths is not None
    return [Path(path).name for path in dataset.train.paths]


@pytest.mark.parametrize("out", ["photos", "photos/fox", "link/fox", "photos/owl"])
def test_a_run_among_images_is_refused(
    out: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out that names a folder of images of --data is refused, also if a link leads there, and nothing is written."""
    (tmp_path / "link").symlink_to(photos)
    before = files(tmp_path)
    error = refused(capsys, ["train", *TINY, "--data", photos, "--out", tmp_path / out])
    assert "among which its pictures would be trained on" in error
    assert files(tmp_path) == before


def test_runs_and_pictures_in_their_data_are_no_data(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs in their folder of images, and what `views` draws there, are not trained on: a later run sees the same."""
    monkeypatch.chdir(photos)
    before = images_of(photos)
    assert main(["train", *TINY, "--data", ".", "--crop-size", "16"]) == ExitCode.DONE
    assert main(["train", *TINY, "--data", ".", "--crop-size", "16", "--out", "fox/run"]) == ExitCode.DONE
    assert main(["views", ".", "--device", "cpu", "--count", "2"]) == ExitCode.DONE
    assert (photos / "views.png").is_file()
    assert (photos / "fox/run/views.png").is_file()
    capsys.readouterr()
    assert images_of(photos) == before
    assert main(["views", ".", "--device", "cpu", "--count", "2"]) == ExitCode.DONE
    output = " ".join(capsys.readouterr().out.split())
    assert "2 classes" in output
    assert "2 runs, 1 picture of fastmoco" in output


def test_a_picture_that_would_be_an_image_is_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`views` writes no picture of another name into its folder of images, and does not replace an image there."""
    monkeypatch.chdir(photos)
    assert "would be trained on" in refused(capsys, ["views", ".", "--out", "grid.png", "--device", "cpu"])
    (photos / "fox" / "0.png").rename(photos / "fox" / "views.png")
    before = (photos / "fox" / "views.png").read_bytes()
    assert "is an image of" in refused(capsys, ["views", ".", "--out", "fox/views.png", "--device", "cpu"])
    assert (photos / "fox" / "views.png").read_bytes() == before


def test_beside_the_data_is_no_error(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside the images, in the folder of a list of images, or named like a data set is accepted."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--data", str(photos), "--out", "photos-runs"]) == ExitCode.DONE
    (photos / "list.txt").write_text("".join(f"{kind}/{i}.png\n" for kind in ("fox", "owl") for i in range(8)))
    assert main(["train", *TINY, "--data", str(photos / "list.txt"), "--out", str(photos / "run")]) == ExitCode.DONE
    (tmp_path / "shapes").mkdir()
    assert main(["train", *TINY, "--data", "shapes", "--out", "shapes/run"]) == ExitCode.DONE


def test_an_evaluation_in_its_data_is_no_data(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation in a new folder among its images is not evaluated by the next; among images it is refused."""
    assert main(["train", *TINY, "--crop-size", "16", "--out", str(tmp_path / "run")]) == ExitCode.DONE
    cache = ["--data-root", tmp_path / "cache", "--device", "cpu", "--workers", "0"]
    before = images_of(photos)
    arguments = ["eval", tmp_path / "run", "--data", photos, "--probes", "knn", *cache]
    assert main(list(map(str, [*arguments, "--out", photos / "results"]))) == ExitCode.DONE
    assert (photos / "results" / "retrieval.png").is_file()
    assert images_of(photos) == before
    refused(capsys, [*arguments, "--out", photos / "fox"])
