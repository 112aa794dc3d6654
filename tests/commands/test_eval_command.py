"""fastmoco eval from the command line: every probe, what it leaves behind, and what is wrong in one line."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.splits import Part
from fastmoco.export.read import read_backbone
from pipelines.data.dataset import load_dataset
from pipelines.data.shapes import make_shapes
from tests.commands.test_cli import TINY

CLASSES = ("bird", "cat", "frog")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, on shapes: one step of a network that is as small as they get."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", *TINY, "--crop-size", "16", "--out", str(out)]) == ExitCode.DONE
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as CIFAR-10 is kept: train and test, class folders, small JPEGs."""
    root = tmp_path_factory.mktemp("data") / "cifar-like"
    for part, count, start in (("train", 60, 0), ("test", 24, 1_000)):
        pixels, labels = make_shapes(count * 4, start=start)
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number, image in enumerate(pixels[labels == label][: count // 3]):
                Image.fromarray(image).save(root / part / name / f"{number:03d}.jpg", quality=95)
    return root


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `fastmoco eval`: the exit code and what was said, one line where something is wrong."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        where = ["--device", "cpu", "--data-root", str(tmp_path / "cache")]
        code = main(["eval", *map(str, arguments), *where])
        said = capsys.readouterr()
        if code == ExitCode.DONE:
            return code, said.out
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("fastmoco: error: ")
        return code, said.err

    return call


FEW = ("--fine-tune-epochs", "1", "--linear-epochs", "3", "--labels", "50%,2-per-class", "--label-seeds", "2")


@pytest.mark.slow
def test_every_probe_and_everything_it_leaves_behind(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    every = "knn,linear,logistic,few-label,fine-tune"
    code, said = run(trained, "--data", folder, "--probes", every, *FEW, "--out", tmp_path / "out")
    assert code == ExitCode.DONE
    left = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [probe["probe"] for probe in left["probes"]] == [
        "knn",
        "linear",
        "logistic",
        "few-label",
        "few-label",
        "fine-tune",
    ]
    for probe in left["probes"]:
        assert 0 <= probe["top1_percent"] <= 100
        assert probe["seconds"] >= 0
    assert [probe["labels"] for probe in left["probes"][3:5]] == [30, 6]
    assert left["data"]["classes"] == list(CLASSES)
    assert left["backbone"]["arch"] == "resnet18"
    assert re.fullmatch("[0-9a-f]{64}", left["backbone"]["weights_sha256"])
    assert left["label_free"]["verdict"] in said.replace("\n", " ")
    for line in ("24 images of cifar-like/test, against 60 of cifar-like/train", "± ", "bird", "effective rank"):
        assert line in said
    for name in left["files"]:
        path = tmp_path / "out" / name
        assert path.stat().st_size > 50
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 200
    assert {"retrieval.png", "feature_map.png", "confusion-fine-tune.png"} <= set(left["files"])
    with (tmp_path / "out" / "confusion-knn.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    right = sum(int(rows[i + 1][i + 1]) for i in range(3))
    assert left["probes"][0]["top1_percent"] == pytest.approx(100 * right / 24)


def test_knn_of_the_command_is_scikit_learns_on_the_kept_features(run, trained: Path, tmp_path: Path) -> None:
    code, _ = run(trained, "--limit", "200", "--probes", "knn", "--knn-k", "20", "--no-pictures")
    assert code == ExitCode.DONE
    left = json.loads((trained / "eval" / "eval.json").read_text())
    dataset = load_dataset("shapes", data_root=tmp_path, limit=200)
    assert dataset.test is not None
    options = EvalOptions(run=str(trained), data_root=str(tmp_path / "cache"))
    extractor = Extractor(read_backbone(trained), options, torch.device("cpu"), Console(quiet=True))
    bank, asked = (
        extractor.features(Part(index, np.arange(len(index)))).numpy() for index in (dataset.train, dataset.test)
    )
    votes: Any = lambda distance: np.exp((1 - distance) / 0.1)  # noqa: E731 - scikit-learn's stubs know names alone
    theirs = KNeighborsClassifier(20, weights=votes, metric="cosine", algorithm="brute")
    theirs.fit(bank, dataset.train.labels)
    assert dataset.test.labels is not None
    assert left["probes"][0]["top1_percent"] == pytest.approx(100 * theirs.score(asked, dataset.test.labels), abs=0.1)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2, "what was extracted was found again"


def test_features_are_extracted_once(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    def call(*more: str) -> tuple[str, list]:
        arguments = ("--data", folder, "--probes", "knn", "--no-pictures", "--out", tmp_path / "out", *more)
        code, said = run(trained, *arguments)
        assert code == ExitCode.DONE
        probes = json.loads((tmp_path / "out" / "eval.json").read_text())["probes"]
        return said, [probe["top1_percent"] for probe in probes]

    first, numbers = call()
    assert first.count("images/s") == 2
    again, same = call()
    assert again.count("kept from before") == 2
    assert same == numbers
    assert "images/s" in call("--crop-size", "24")[0], "another preprocessing"
    assert "kept from before" not in call("--no-feature-cache")[0]


@pytest.mark.parametrize("kind", ["padded", "resized"])
def test_the_linear_probe_on_new_crops(run, trained: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    flags = ("--linear-views", kind, "--linear-epochs", "2", "--linear-schedule", "cosine", "--no-pictures")
    code, said = run(trained, "--data", folder, "--probes", "linear", *flags, "--out", tmp_path / "out")
    assert code == ExitCode.DONE
    assert f"SGD, lr 30 cosine, 2 epochs, {kind} views" in said


def test_threads_are_tuned_unless_a_number_is_given(
    run, trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def tuned(batches: Any) -> Any:
        for batch in batches:
            used.append(torch.get_num_threads())
            yield batch

    monkeypatch.setattr("fastmoco.evaluation.extractor.with_fastest_threads", tuned)
    flags = ["--data", folder, "--probes", "linear,fine-tune", "--linear-epochs", "7", "--fine-tune-epochs", "3"]
    flags += ["--linear-batch-size", "60", "--fine-tune-batch-size", "30", "--no-pictures", "--no-feature-cache"]
    assert run(trained, *flags)[0] == ExitCode.DONE
    assert len(used) == 2 + 7 + 3 * 2 + 1  # features of both parts, two epochs of probes, scores of the fine-tuned
    before = torch.get_num_threads()
    monkeypatch.setattr("fastmoco.evaluation.extractor.Extractor.features", _with_one_thread(Extractor.features))
    used.clear()
    assert run(trained, *flags, "--cpu-threads", "1", "--out", tmp_path / "fixed")[0] == ExitCode.DONE
    assert used == []
    assert torch.get_num_threads() == before


def _with_one_thread(features: Any) -> Any:
    def checked(*arguments: Any) -> Any:
        assert torch.get_num_threads() == 1
        return features(*arguments)

    return checked


def test_without_labels_the_features_are_judged_alone(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    heap = tmp_path / "heap"
    heap.mkdir()
    for number, path in enumerate(sorted((folder / "train").rglob("*.jpg"))[:12]):
        shutil.copy(path, heap / f"{number}.jpg")
    code, said = run(trained, "--data", heap, "--out", tmp_path / "out")
    assert code == ExitCode.DONE
    assert "none, without labels" in said
    assert "verdict" in said
    left = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert left["probes"] == []
    assert sorted(left["files"]) == ["feature_map.png", "retrieval.png"]
    code, line = run(trained, "--data", heap, "--probes", "knn", "--out", tmp_path / "out")
    assert code == ExitCode.DATA
    assert "heap has no labels, and the knn probe needs labelled images of two classes" in line


def test_without_a_test_part_a_tenth_is_held_out(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    code, said = run(trained, "--data", folder / "train", "--probes", "knn", "--no-pictures", "--out", tmp_path / "o")
    assert code == ExitCode.DONE
    assert "6 images held out of train, against the other 54" in said


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--probes", "lineer"], ExitCode.CONFIG, "--probes has 'lineer'; did you mean linear?"),
        (["--probes", "knn", "--labels", "1%"], ExitCode.CONFIG, "add few-label to --probes"),
        (["--labels", "many"], ExitCode.CONFIG, "--labels has 'many', expected a share such as 1% or 10%"),
        (["--knn-k", "61"], ExitCode.CONFIG, "--knn-k is 61, and the bank has 60 images: use 60 or fewer"),
        (["--knn-k", "0"], ExitCode.CONFIG, "--knn-k is 0, expected 1 or more"),
        (["--labels", "21-per-class"], ExitCode.DATA, "the class 'bird' has 20 labelled images, fewer than asked for"),
        (["--labels", "1%"], ExitCode.DATA, "of which the share leaves none: use 1-per-class"),
        (["--arch", "resnet50"], ExitCode.CHECKPOINT, "resnet18"),
        (["--arch", "resnet19"], ExitCode.CONFIG, "resnet19"),
        (["--crop-size", "4"], ExitCode.CONFIG, "--crop-size is 4, expected 8 pixels or more"),
        (["--lineer-lr", "3"], ExitCode.CONFIG, "did you mean --linear-lr?"),
        (["--map", "umap"], ExitCode.CONFIG, "pip install umap-learn"),
        (["--out", "/proc/nowhere"], ExitCode.CONFIG, "choose another with --out"),
        (["--data", "/nowhere"], ExitCode.DATA, "/nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_an_image_is_read(
    run, trained: Path, folder: Path, tmp_path: Path, flags: list[str], code: ExitCode, said: str
) -> None:
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    found, line = run(trained, "--data", folder, *flags, *out)
    assert found == code
    assert said in line
    assert not (tmp_path / "cache" / "features").exists()


def test_what_is_no_backbone_is_refused(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, content in (("a.pth.tar", b"no checkpoint"), ("b.safetensors", b"\0" * 50)):
        (tmp_path / path).write_bytes(content)
        code, line = run(tmp_path / path, "--data", folder)
        assert code == ExitCode.CHECKPOINT
        assert path in line
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, foreign)
    assert run(foreign, "--data", folder)[0] == ExitCode.CHECKPOINT
    assert run(tmp_path / "absent", "--data", folder)[0] == ExitCode.CHECKPOINT
    assert run(tmp_path / "empty", "--data", folder)[0] == ExitCode.CONFIG


def test_a_file_that_does_not_name_its_data_needs_it(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "backbone.safetensors", tmp_path / "alone.safetensors")
    code, line = run(tmp_path / "alone.safetensors")
    assert code == ExitCode.CONFIG
    assert "name the images with --data" in line
    flags = ("--probes", "knn", "--no-pictures", "--crop-size", "16", "--out", tmp_path / "out")
    assert run(tmp_path / "alone.safetensors", "--data", folder, *flags)[0] == ExitCode.DONE
    alone = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert run(trained, "--data", folder, *flags)[0] == ExitCode.DONE
    named = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert named["probes"][0]["top1_percent"] == alone["probes"][0]["top1_percent"], "prepared alike, and so as good"


def test_a_damaged_image_names_itself(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken = copy / "test" / "cat" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    code, line = run(trained, "--data", copy, "--out", tmp_path / "out")
    assert code == ExitCode.DATA
    assert "003.jpg" in line


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", "--help"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    names = [name for name in EvalOptions.__dataclass_fields__ if name != "run"]
    assert [name for name in names if "--" + name.replace("_", "-") not in text] == []
