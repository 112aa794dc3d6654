"""`fastmoco eval`: every probe, output files, and error messages in one line."""

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

from fastmoco.backbones.read import read_backbone
from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.splits import Subset
from pipelines.data.dataset import load_dataset
from pipelines.data.shapes import make_shapes

CLASSES = ("bird", "cat", "frog")


@pytest.fixture(scope="module")
def trained(shapes_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that run, in which evaluations are written."""
    return Path(shutil.copytree(shapes_run, tmp_path_factory.mktemp("runs") / "trained"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of CIFAR-10: train and test, class folders, small JPEGs."""
    root = tmp_path_factory.mktemp("data") / "cifar-like"
    for split, count, start in (("train", 60, 0), ("test", 24, 1_000)):
        pixels, labels = make_shapes(count * 4, start=start)
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number, image in enumerate(pixels[labels == label][: count // 3]):
                Image.fromarray(image).save(root / split / name / f"{number:03d}.jpg", quality=95)
    return root


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run `fastmoco eval`; returns the exit code and the output, a single line for errors."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        common = ["--device", "cpu", "--data-root", str(tmp_path / "cache")]
        code = main(["eval", *map(str, arguments), *common])
        captured = capsys.readouterr()
        if code == ExitCode.DONE:
            return code, captured.out
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("fastmoco: error: ")
        return code, captured.err

    return call


FEW = ("--fine-tune-epochs", "1", "--linear-epochs", "3", "--labels", "50%,2-per-class", "--label-seeds", "2")


@pytest.mark.slow
def test_every_probe_and_all_output_files(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    probes = "knn,linear,logistic,few-label,fine-tune"
    code, output = run(trained, "--data", folder, "--probes", probes, *FEW, "--out", tmp_path / "out")
    assert code == ExitCode.DONE
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [probe["probe"] for probe in record["probes"]] == [
        "knn",
        "knn-output",
        "linear",
        "logistic",
        "few-label",
        "few-label",
        "fine-tune",
    ]
    for probe in record["probes"]:
        assert 0 <= probe["top1_percent"] <= 100
        assert probe["seconds"] >= 0
    assert [probe["labels"] for probe in record["probes"][4:6]] == [30, 6]
    assert record["data"]["classes"] == list(CLASSES)
    assert record["backbone"]["arch"] == "resnet18"
    assert re.fullmatch("[0-9a-f]{64}", record["backbone"]["weights_sha256"])
    assert record["label_free"]["verdict"].removeprefix("not collapsed: ") in output
    assert f"is it learning? {record['verdict']}: {record['remedy']}" in output.splitlines()
    assert record["ended"]
    lines = [
        line for line in output.splitlines() if re.match(r"(knn|linear|logistic|few-label|fine-tune).*: top-1 ", line)
    ]
    assert len(lines) == 7, "each as soon as it is there"
    assert "accuracy of 24 queries, against a bank of 60 images" in output
    for line in ("24 images of cifar-like/test, against 60 of cifar-like/train", "± ", "bird", "effective rank"):
        assert line in output
    for name in record["files"]:
        path = tmp_path / "out" / name
        assert path.stat().st_size > 50
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 200
    assert {"retrieval.png", "feature_map.png", "confusion-fine-tune.png"} <= set(record["files"])
    with (tmp_path / "out" / "confusion-knn.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    right = sum(int(rows[i + 1][i + 1]) for i in range(3))
    assert record["probes"][0]["top1_percent"] == pytest.approx(100 * right / 24)


def test_knn_accuracies_equal_scikit_learn_on_the_cached_features(run, trained: Path, tmp_path: Path) -> None:
    code, _ = run(trained, "--limit", "200", "--probes", "knn", "--knn-k", "20", "--no-pictures")
    assert code == ExitCode.DONE
    record = json.loads((trained / "eval" / "eval.json").read_text())
    assert record["files"] == ["confusion-knn.csv", "confusion-knn-output.csv"]
    assert {path.name for path in (trained / "eval").iterdir()} == {*record["files"], "eval.json"}
    dataset = load_dataset("shapes", data_root=tmp_path, limit=200)
    assert dataset.test is not None
    options = EvalOptions(run=str(trained), data_root=str(tmp_path / "cache"))
    extractor = Extractor(read_backbone(trained), options, torch.device("cpu"), Console(quiet=True))
    bank, queries = (extractor.features(Subset(i, np.arange(len(i)))) for i in (dataset.train, dataset.test))
    votes: Any = lambda distance: np.exp((1 - distance) / 0.1)  # noqa: E731 - the stubs lack callables
    assert dataset.test.labels is not None
    sides = {"knn": (bank, queries), "knn-output": (extractor.project(bank), extractor.project(queries))}
    assert [probe["probe"] for probe in record["probes"]] == list(sides)
    for probe, (own_bank, own_queries) in zip(record["probes"], sides.values(), strict=True):
        reference = KNeighborsClassifier(20, weights=votes, metric="cosine", algorithm="brute")
        reference.fit(own_bank.numpy(), dataset.train.labels)
        expected = 100 * reference.score(own_queries.numpy(), dataset.test.labels)
        assert probe["top1_percent"] == pytest.approx(expected, abs=0.1)
    assert [probe["settings"]["on"] for probe in record["probes"]] == ["features", "output"]
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2, "the features were read from the cache"


def test_a_backbone_without_its_head_has_features_only(run, trained: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone.safetensors"
    assert main(["export", str(trained), "--to", "safetensors", "-o", str(backbone)]) == ExitCode.DONE
    line = (backbone, "--data", "shapes", "--limit", "100", "--probes", "knn", "--no-pictures", "--out", tmp_path / "e")
    code, output = run(*line)
    assert code == ExitCode.DONE
    assert re.search(r"kNN on +features.*this file has no projection head", output)
    assert [probe["probe"] for probe in json.loads((tmp_path / "e" / "eval.json").read_text())["probes"]] == ["knn"]
    code, output = run(*line, "--knn-on", "output")
    assert code == ExitCode.CONFIG
    assert "--knn-on output needs the projection head" in output


def test_features_are_extracted_once(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    def call(*more: str) -> tuple[str, list]:
        arguments = ("--data", folder, "--probes", "knn", "--no-pictures", "--out", tmp_path / "out", *more)
        code, output = run(trained, *arguments)
        assert code == ExitCode.DONE
        probes = json.loads((tmp_path / "out" / "eval.json").read_text())["probes"]
        return output, [probe["top1_percent"] for probe in probes]

    first, accuracies = call()
    assert first.count("images/s") == 2
    again, repeated = call()
    assert again.count("from the cache") == 2
    assert repeated == accuracies
    assert "images/s" in call("--crop-size", "24")[0], "different preprocessing"
    assert "from the cache" not in call("--no-feature-cache")[0]


@pytest.mark.parametrize("kind", ["padded", "resized"])
def test_the_linear_probe_on_new_crops(run, trained: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    flags = ("--linear-views", kind, "--linear-epochs", "2", "--linear-schedule", "cosine", "--no-pictures")
    code, output = run(trained, "--data", folder, "--probes", "linear", *flags, "--out", tmp_path / "out")
    assert code == ExitCode.DONE
    assert f"SGD, lr 30 cosine, 2 epochs, {kind} views" in output


def test_probes_that_have_ended_are_kept_when_it_is_stopped(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmoco.evaluation.suite.Evaluation._linear", stopped)
    flags = ["--data", str(folder), "--out", str(tmp_path / "out"), "--data-root", str(tmp_path), "--device", "cpu"]
    capsys.readouterr()
    assert main(["eval", str(trained), *flags]) == 130
    output = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    ended = ["knn", "knn-output"]
    assert [probe["probe"] for probe in record["probes"]] == ended
    assert not record["ended"]
    assert set(record["files"]) == {f"confusion-{probe}.{kind}" for probe in ended for kind in ("csv", "png")}
    assert f"knn: top-1 {record['probes'][0]['top1_percent']:.1f} % in " in output
    assert f"stopped: knn, knn-output ended before, kept in {tmp_path}/out/eval.json" in output


def test_knn_in_training_is_told_apart(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    flags = ("--data", folder, "--probes", "knn", "--no-pictures", "--out", tmp_path / "out")
    assert "kNN in training" not in run(copy, *flags)[1], "it was not measured"
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epoch": 3, "knn_top1_percent": 26.94}\n')
    said = "kNN in training was 26.9 % at epoch 3, with the run's own bank and queries (--limit 16), k 200 and T 0.1: "
    assert said in run(copy, *flags)[1]


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
    assert (
        len(used) == 2 + 7 + 3 * 2 + 1
    )  # features of bank and queries, linear steps, fine-tuning steps, scores of the fine-tuned model
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


def test_without_labels_only_collapse_is_diagnosed(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for number, path in enumerate(sorted((folder / "train").rglob("*.jpg"))[:12]):
        shutil.copy(path, unlabelled / f"{number}.jpg")
    code, output = run(trained, "--data", unlabelled, "--out", tmp_path / "out")
    assert code == ExitCode.DONE
    assert "none, without labels" in output
    assert "is it learning? " in output
    assert output.count("lower is better") == 3, "alignment, uniformity and separation"
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert record["probes"] == []
    assert sorted(record["files"]) == ["feature_map.png", "retrieval.png"]
    code, line = run(trained, "--data", unlabelled, "--probes", "knn", "--out", tmp_path / "out")
    assert code == ExitCode.DATA
    assert "unlabelled has no labels, and the knn probe needs labelled images of two classes" in line


def test_an_evaluation_of_a_failed_run_says_so(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    failed = shutil.copytree(trained, tmp_path / "failed")
    status = json.loads((failed / "status.json").read_text())
    (failed / "status.json").write_text(json.dumps(status | {"state": "failed", "exit_code": 5, "step": 1_234}))
    arguments = ("--data", folder, "--probes", "knn", "--no-pictures", "--out", tmp_path / "out")
    said = "this run failed at step 1,234 with exit code 5; what it saved before is evaluated"
    for path, lines in ((failed, 1), (next((failed / "checkpoints").glob("*.safetensors")), 1), (trained, 0)):
        code, output = run(path, *arguments)
        assert code == ExitCode.DONE
        assert " ".join(output.split()).count(said) == lines


def test_without_a_test_split_a_tenth_is_held_out(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    code, output = run(trained, "--data", folder / "train", "--probes", "knn", "--no-pictures", "--out", tmp_path / "o")
    assert code == ExitCode.DONE
    assert "6 images held out of train, against the other 54" in output


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--probes", "lineer"], ExitCode.CONFIG, "--probes has 'lineer'; did you mean linear?"),
        (["--probes", "knn", "--labels", "1%"], ExitCode.CONFIG, "add few-label to --probes"),
        (["--labels", "many"], ExitCode.CONFIG, "--labels has 'many', expected a percentage such as 1% or 10%"),
        (["--knn-k", "61"], ExitCode.CONFIG, "--knn-k is 61, and the bank has 60 images: use 60 or fewer"),
        (["--knn-k", "0"], ExitCode.CONFIG, "--knn-k is 0, expected 1 or more"),
        (["--labels", "21-per-class"], ExitCode.DATA, "the class 'bird' has 20 labelled images, fewer than requested"),
        (["--labels", "1%"], ExitCode.DATA, "and the percentage rounds to 0: use 1-per-class"),
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
def test_invalid_requests_are_rejected_before_an_image_is_read(
    run, trained: Path, folder: Path, tmp_path: Path, flags: list[str], code: ExitCode, message: str
) -> None:
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    actual, line = run(trained, "--data", folder, *flags, *out)
    assert actual == code
    assert message in line
    assert not (tmp_path / "cache" / "features").exists()


def test_files_without_a_backbone_are_rejected(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, content in (("a.pth.tar", b"no checkpoint"), ("b.safetensors", b"\0" * 50)):
        (tmp_path / path).write_bytes(content)
        code, line = run(tmp_path / path, "--data", folder)
        assert code == ExitCode.CHECKPOINT
        assert path in line
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, other)
    assert run(other, "--data", folder)[0] == ExitCode.CHECKPOINT
    assert run(tmp_path / "absent", "--data", folder)[0] == ExitCode.CHECKPOINT
    assert run(tmp_path / "empty", "--data", folder)[0] == ExitCode.CONFIG


def test_a_file_that_does_not_record_its_data_needs_the_flag(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "alone.safetensors"
    shutil.copy(trained / "backbone.safetensors", backbone)
    code, line = run(backbone)
    assert code == ExitCode.CONFIG
    assert "name the images with --data" in line
    flags = ("--probes", "knn", "--no-pictures", "--crop-size", "16", "--out", tmp_path / "out")
    assert run(backbone, "--data", folder, *flags)[0] == ExitCode.DONE
    of_file = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert run(trained, "--data", folder, *flags)[0] == ExitCode.DONE
    of_run = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert of_run["probes"][0]["top1_percent"] == of_file["probes"][0]["top1_percent"], (
        "same preprocessing, same accuracy"
    )


def test_a_damaged_image_is_named(run, trained: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken = copy / "test" / "cat" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    code, line = run(trained, "--data", copy, "--out", tmp_path / "out")
    assert code == ExitCode.DATA
    assert "003.jpg" in line


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help-all"]) == ExitCode.DONE
    text = capsys.readouterr().out.replace("--[no-]", "--")
    names = [name for name in EvalOptions.__dataclass_fields__ if name != "run"]
    assert [name for name in names if "--" + name.replace("_", "-") not in text] == []
