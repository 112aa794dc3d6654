"""Advice is given where images or steps are few, and names numbers that silence it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.advice import FEW_IMAGES, FEW_STEPS, advice


def test_enough_of_both_is_not_remarked_on() -> None:
    assert advice(FEW_IMAGES, FEW_STEPS, 10, pretrained=False) == []


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 999])
def test_the_epochs_it_names_are_enough_and_no_more(steps_per_epoch: int) -> None:
    (line,) = advice(50_000, steps_per_epoch, steps_per_epoch, pretrained=False)
    found = re.search(r"--epochs ([\d,]+)", line)
    assert found is not None
    epochs = int(found[1].replace(",", ""))
    assert advice(50_000, epochs * steps_per_epoch, steps_per_epoch, pretrained=False) == []
    assert advice(50_000, (epochs - 1) * steps_per_epoch, steps_per_epoch, pretrained=False) != []


def test_few_images_are_enough_to_go_on_from_pretrained_weights() -> None:
    assert len(advice(8, 5_000, 1, pretrained=False)) == 1
    assert advice(8, 5_000, 1, pretrained=True) == []


def test_a_run_on_few_images_says_so_at_its_start(tmp_path: Path, capsys) -> None:
    flags = [
        "--limit",
        "8",
        "--batch-size",
        "8",
        "--bn-splits",
        "1",
        "--moco-k",
        "8",
        "--width",
        "0.125",
        "--epochs",
        "2",
    ]
    flags += ["--arch", "resnet18", "--crop-size", "8", "--device", "cpu", "--pipeline", "resident", "--workers", "1"]
    assert main(["train", *flags, "--knn-every", "0", "--no-tensorboard", "--out", str(tmp_path)]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("2 steps are few to learn in: --epochs 1,000 makes 1,000") < lines.index("done")
    assert any(line.startswith("8 images are few to learn from: ") for line in lines)
