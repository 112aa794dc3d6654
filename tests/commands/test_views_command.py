"""`fastmoco views` draws the views of a run with the same seed, and the differences of two pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.cli import main
from fastmoco.commands import views as module
from fastmoco.config import Aug
from fastmoco.errors import ExitCode
from fastmoco.run.plots import comparison_grid
from pipelines.augment.presets import V2
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.dataset import load_dataset
from pipelines.plan.planner import Planner
from tests.oddities import encode, picture

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several sizes and colours."""
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.png").write_bytes(encode(np.roll(picture(30 + i, 50 - i), i % 3, axis=2), "PNG"))
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Run `fastmoco views`; returns the exit code and all output."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        code = main(["views", *map(str, arguments), "--device", "cpu", "--data-root", str(tmp_path / "cache")])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("aug", get_args(Aug))
def test_views_of_every_augmentation(aug: str, folder, tmp_path, run):
    code, output = run(folder, "-o", tmp_path / "v.png", "--aug", aug, "--count", "4", "--crop-size", "32")
    assert code == ExitCode.DONE, output
    assert len(np.unique(pixels(tmp_path / "v.png"))) > 20


def test_the_views_are_those_of_training(folder, tmp_path, run, monkeypatch):
    """A run with another batch size and shuffled keys sees exactly these views in that epoch."""
    drawn = []
    monkeypatch.setattr(module, "views_grid", lambda query, key, *_, **__: drawn.append((query, key)))
    code, output = run(
        folder,
        "-o",
        tmp_path / "v.png",
        "--seed",
        "5",
        "--epoch",
        "3",
        "--aug",
        "v2",
        "--crop-size",
        "16",
        "--count",
        "6",
    )
    assert code == ExitCode.DONE
    assert "6 of epoch 3, seed 5" in output
    index = load_dataset(str(folder), data_root=tmp_path).train
    planner = Planner(index.sizes, seed=5, batch_size=10, augmentation=V2, shuffle_keys=True)
    source = open_source("torch", index, 16, CPU, 0)
    trained = next(iter(open_pipeline("torch", index, planner, source, 16, CPU, torch.float32, 0).views(6, 7)))
    ((query, key),) = drawn
    torch.testing.assert_close(query, trained.query[:6].contiguous(), rtol=0, atol=0, check_stride=False)
    torch.testing.assert_close(key, trained.key[trained.key_order.argsort()][:6], rtol=0, atol=0, check_stride=False)


def test_the_same_seed_draws_the_same_picture(folder, tmp_path, run):
    def draw(name: str, *flags: str) -> np.ndarray:
        code, output = run(folder, "-o", tmp_path / name, "--crop-size", "16", *flags)
        assert code == ExitCode.DONE
        assert str(tmp_path / name) in output
        return pixels(tmp_path / name)

    first = draw("a.png")
    assert first.shape[1] < 4 * 3 * 100 + 100
    assert (first == draw("b.png")).all()
    assert (first == draw("c.png", "--pipeline", "resident")).all()
    assert (first != draw("d.png", "--seed", "1")).any()
    assert (first != draw("e.png", "--epoch", "1")).any()
    baseline = draw("f.png", "--pipeline", "dataloader")
    assert (first != baseline).any()
    assert (baseline == draw("g.png", "--pipeline", "dataloader")).all()


def test_two_pipelines_compared(folder, tmp_path, run):
    code, output = run(
        folder, "-o", tmp_path / "c.png", "--compare", "torch, resident", "--crop-size", "16", "--count", "5"
    )
    assert code == ExitCode.DONE
    means = [float(number) for number in re.findall(r"difference +mean ([\d.]+)", output)]
    assert len(means) == 2
    assert max(means) < 1
    code, output = run(folder, "-o", tmp_path / "c.png", "--compare", "torch,dataloader", "--crop-size", "16")
    means = [float(number) for number in re.findall(r"difference +mean ([\d.]+)", output)]
    assert min(means) > 5


def test_a_comparison_shows_eight_times_the_difference(tmp_path):
    """Rows of known colours: both views of both pipelines, each pair followed by its difference."""
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    values = [(200, 100, 50), (40, 60, 80)], [(210, 98, 50), (40, 63, 80)]

    def views(colour: tuple[int, int, int]) -> torch.Tensor:
        return ((torch.tensor(colour) / 255 - 0.5) / 0.25).view(1, 3, 1, 1).expand(3, 3, 32, 32)

    drawn = [(views(query), views(key)) for query, key in values]
    comparison_grid(["a", "b"], drawn, mean, std, tmp_path / "c.png")
    sheet = pixels(tmp_path / "c.png")
    tops = []
    for colour in [values[0][0], values[1][0], (80, 16, 0), values[0][1], values[1][1], (0, 24, 0)]:
        rows, columns = np.nonzero((sheet == colour).all(axis=2))
        assert len(rows) == 3 * 96 * 96
        assert np.ptp(columns) == 3 * 96 + 2 * 2 - 1
        tops.append(rows.min())
    assert tops == sorted(tops)
    with pytest.raises(ValueError, match="views of one shape"):
        comparison_grid(["a", "b"], [drawn[0], (drawn[1][0][:1], drawn[1][1])], mean, std, tmp_path / "d.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "torch"], "--compare is 'torch', expected two pipelines"),
        (["--compare", "torch,resdent"], "--compare is 'resdent', expected one of .* did you mean resident"),
        (["--out", "views.jpg"], "--out is 'views.jpg', expected the name of a .png file"),
        (["--count", "0"], "--count is 0, expected 1 to 256"),
        (["--epoch", "-1"], "--epoch is -1, expected 0 or more"),
        (["--crop-size", "4"], "--crop-size is 4, expected 8 pixels or more"),
        (["--piepline", "torch"], "unknown argument '--piepline'; did you mean --pipeline"),
        (["--out", "/dev/null/v.png"], "cannot write /dev/null/v.png .*choose another with --out"),
        (["--pipeline", "ffcv"], "ffcv"),
    ],
)
def test_errors_are_reported_in_one_line(folder, run, flags, message):
    code, output = run(folder, *flags)
    assert code in (ExitCode.CONFIG, ExitCode.DATA)
    assert re.search(message, output), output
    assert output.count("\n") == 1
