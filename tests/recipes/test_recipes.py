"""Every recipe has a command, an expected accuracy and its source, and trains when scaled down."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from fastmoco.cli import main
from fastmoco.commands.recipes import in_full
from fastmoco.commands.train_arguments import parse_train
from fastmoco.errors import ExitCode
from fastmoco.evaluation.options import EvalOptions
from fastmoco.recipes import PUBLISHED, RECIPES, entry, recipe
from fastmoco.run.directory import read_config
from fastmoco.run.metrics import read_metrics
from fastmoco.sweep.runs import Axis
from tests.oddities import encode, picture
from tests.run.test_train import newest

# One step of 16 images with an eighth of the width; augmentation, schedule, loss, head and mechanism stay.
SMALL = "--limit 16 --batch-size 16 --bn-splits 2 --moco-k 16 --width 0.125 --epochs 1 --warmup-epochs 0 --amp fp32"
SMALL += " --device cpu --pipeline resident --workers 0 --knn-every 0 --no-tensorboard"
KEPT = ("aug", "arch", "moco_m", "moco_t", "mlp", "head", "symmetric", "wd", "final_lr", "mechanism", "crop_scale_min")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen generated JPEGs of two classes, grey like MNIST and imagenet-mini."""
    folder = tmp_path_factory.mktemp("stand-in")
    for number in range(16):
        path = folder / f"n{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(np.roll(picture(40, 50), 3 * number, axis=1), "JPEG", quality=90))
    return folder


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_trains_when_scaled_down(
    name: str, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmoco.run.recorder.curves", lambda *arguments: None)  # a second each
    own = recipe(name)
    schedule = [] if own.optim.schedule is None else ["--schedule", "1"]
    data = [] if name == "shapes" else ["--data", str(stand_in)]
    side = ["--crop-size", str(min(32, own.augment.crop_size or 32))]
    flags = [*SMALL.split(), *schedule, *data, *side, "--out", str(tmp_path / "run")]
    assert main(["train", name, *flags]) == ExitCode.DONE
    (*_, last) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert last["step"] == 1
    assert math.isfinite(last["loss"])
    assert last["lr"] == own.optim.lr
    ran = read_config(tmp_path / "run").flat()
    assert [field for field in KEPT if own.flat()[field] not in (None, ran[field])] == []
    assert newest(tmp_path / "run")["queue/keys"].shape == (16, own.model.moco_dim)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_can_be_given_as_flags(name: str) -> None:
    """The flags that `fastmoco recipes NAME` prints for training and evaluation are accepted."""
    own, text = entry(name), in_full(name)
    settings = re.search(r"settings\s+(.*?)expected", text, re.DOTALL)
    assert settings is not None
    assert parse_train(settings[1].split()) == own.config
    for expected in own.expected:
        parse_train([name, *expected.flags.split()])
    if own.evaluate:
        flags = [word for word in own.evaluate.split() if word.startswith("--")]
        assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= EvalOptions.__dataclass_fields__.keys()
    if own.vary:
        axis = Axis.parse(own.vary)
        for value in axis.values:
            parse_train([name, *axis.flags(value)])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_an_expected_accuracy_and_its_source(name: str, capsys) -> None:
    own = entry(name)
    assert main(["recipes", name]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert f"fastmoco {'sweep' if own.vary else 'train'} {name}" in text
    assert max(map(len, text.splitlines())) <= 110
    assert own.expected or own.unknown
    for expected in own.expected:
        assert f"{expected.percent:.1f} %" in text
        assert expected.source.split(",")[0] in " ".join(text.split())
    assert ("not run yet" in text) == (not own.measured)


def test_the_table_is_aligned_and_has_the_published_figures(capsys) -> None:
    assert main(["recipes"]) == ExitCode.DONE
    head, *lines, empty, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert (empty, last.split()[-3:]) == ("", ["fastmoco", "recipes", "NAME"])
    expected = {line.split()[0]: line[head.index("expected") : head.index("measured")].strip() for line in lines}
    assert expected["cifar10-demo"] == "82.6 %"
    assert expected["cifar10-demo-symmetric"] == "85.3 %"
    assert (expected["imagenette-blog"], expected["imagewoof-blog"]) == ("64.2 %", "38.6 %")
    assert (expected["imagenet-v1"], expected["imagenet-v2"], expected["imagenet-v2-800"]) == (
        "60.6 %",
        "67.5 %",
        "71.1 %",
    )
    wide = ("imagenet-v1-resnext50", "imagenet-v1-wide2", "imagenet-v1-wide4")
    assert [expected[name] for name in wide] == ["63.9 %", "65.4 %", "68.6 %"]
    assert expected["mnist"] == "unknown"
    assert expected["ablation-queue"] == "a sweep"


def test_the_blogs_learning_rate_falls_from_1e_3_to_1e_5() -> None:
    optim = recipe("imagenette-blog").optim
    assert (optim.lr, optim.final_lr, optim.cos) == (1e-3, 1e-5, True)
    assert recipe("imagenette-blog").model.head == (100, 50)


def test_the_papers_momenta_are_beside_the_ablation() -> None:
    assert list(PUBLISHED["moco_m"].percent.values()) == [None, 55.2, 57.8, 59.0, 58.9]
    assert [float(m) for m in Axis.parse(entry("ablation-momentum").vary).values] == [0, 0.9, 0.99, 0.999, 0.9999]
    assert [float(m) for m in PUBLISHED["moco_m"].percent] == [0, 0.9, 0.99, 0.999, 0.9999]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "imagenet-v2",
            "there is no ./imagenet, which recipe imagenet-v2 trains on: ImageNet-1k (image-net.org)",
        ),
        ("imagewoof-blog", "there is no ./imagewoof2, which recipe imagewoof-blog trains on: Imagewoof: unpack"),
        ("imagenet-mini", "there is no ./imagenet-mini"),
    ],
)
def test_missing_data_is_exit_code_3_with_instructions(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", name]) == ExitCode.DATA
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_named_data_set_that_cannot_be_downloaded_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fetch(*arguments: object, **options: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "EMNIST", fetch)
    assert main(["train", "emnist", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]) == ExitCode.DATA
    assert "EMNIST is not in" in capsys.readouterr().err


def test_emnist_by_class_is_that_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipelines.data.named import array_dataset

    class Emnist:
        def __init__(self, root: str, *, train: bool, split: str, download: bool) -> None:
            assert split == "byclass"
            self.data = torch.zeros(3, 28, 28, dtype=torch.uint8)
            self.data[:, 3, 20] = 200
            self.targets, self.classes = torch.arange(3), ["0", "A", "a"]

    monkeypatch.setattr(datasets, "EMNIST", Emnist)
    dataset = array_dataset("emnist-byclass", tmp_path)
    assert dataset.train.class_names == ("0", "A", "a")
    assert dataset.train.read(1)[20, 3].tolist() == [200, 200, 200], "not transposed, and grey in three channels"
