"""The same from Python as on the command line: settings, errors, runs, images; and a model of one's own."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import fastmoco
from fastmoco import Run, evaluate, export, load_backbone, open_images, train
from fastmoco.api.arguments import arguments
from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.report_page.commands import commands
from fastmoco.report_page.run_files import read_run
from pipelines.errors import DataError
from tests.oddities import encode, picture

TINY: dict[str, Any] = {"data": "shapes", "limit": 32, "batch_size": 8, "bn_splits": 2, "moco_k": 16, "epochs": 2}
TINY |= {"knn_k": 5, "amp": "fp32", "device": "cpu", "workers": 1, "cpu_threads": 1, "pipeline": "resident"}
TINY |= {"crop_size": 16, "tensorboard": False, "seed": 3}


class Net(nn.Module):
    """Feature maps, with a table and a counter that are no parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width, momentum=0.2)
        self.second = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.register_buffer("table", torch.arange(2 * width).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.norm(self.first(x)).relu())
        return y[:, self.table]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(1)
    return Net()


@pytest.fixture(scope="module")
def own(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Run:
    before = copy.deepcopy(net.state_dict())
    run = train(model=net, **TINY, checkpoint_every=4, out=tmp_path_factory.mktemp("runs") / "own")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items()), "it is copied"
    return run


# ---- settings --------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch_and_lists_what_it_has() -> None:
    code = "import sys, fastmoco; print(sorted(set(dir(fastmoco)) & set(fastmoco.__all__)), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{sorted(fastmoco.__all__)} False"


def test_the_functions_stay_functions_whatever_is_imported() -> None:
    code = """
import fastmoco.trainer, fastmoco.backbones.write, fastmoco.evaluation.suite
from fastmoco import export, train
import fastmoco
print(callable(train), callable(export), callable(fastmoco.train), callable(fastmoco.evaluate))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True"] * 4


def test_settings_are_those_of_the_command(tmp_path: Path) -> None:
    settings = {"data": ["a", Path("b")], "cos": True, "symmetric": False, "lr": 0.1, "moco_k": None, "betas": (1, 2)}
    assert arguments(settings) == [
        *("--data", "a", "b", "--cos", "--no-symmetric", "--lr=0.1", "--moco-k=None", "--betas", "1", "2")
    ]
    with pytest.raises(ConfigError, match="lr is a Tensor, expected text, a number"):
        arguments({"lr": torch.zeros(1)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: train(epoch=3), "unknown argument '--epoch'; did you mean --epochs?"),
        (lambda: train("cifar10-dem"), "did you mean 'cifar10-demo'"),
        (lambda: train(RunConfig(), epoch=3), "no field 'epoch'; did you mean 'epochs'?"),
        (lambda: train(epochs="ten"), "epochs"),
        (lambda: train(arch="resnet19"), "did you mean resnet18?"),
        (lambda: train(model=Net(), arch="resnet18"), "arch is 'resnet18' and model a Net: give one of the two"),
        (lambda: train(gpus=2), "use fastmoco train --gpus 2, or torchrun"),
        (lambda: evaluate("nowhere"), "there is no file or folder nowhere"),
        (lambda: evaluate("nowhere", probe="knn"), "did you mean --probes?"),
        (lambda: export("nowhere", to="tim"), "did you mean timm?"),
        (lambda: load_backbone("nowhere"), "there is no file or folder nowhere"),
        (lambda: open_images("nowhere"), "nowhere"),
        (lambda: open_images("shapes", limits=3), "did you mean 'limit'?"),
        (lambda: Run("nowhere"), "expected the folder of a run"),
    ],
)
def test_errors_are_one_line_and_name_the_nearest(call: Any, said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, DataError)) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_call_is_the_run_of_the_command(tmp_path: Path) -> None:
    settings = {**TINY, "arch": "resnet18", "width": 0.125}
    run = train(**settings, out=tmp_path / "python")
    assert main(["train", *arguments(settings), "--out", str(tmp_path / "command")]) == 0
    a, b = (load_file(Run(tmp_path / name).checkpoints[-1]) for name in ("python", "command"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert run.status["state"] == "done"
    assert run.config.optim.epochs == 2
    assert run.metrics[0]["knn_top1_percent"] >= 0
    assert repr(run).splitlines()[0].endswith(f"done, 2 epochs, kNN {run.metrics[-1]['knn_top1_percent']:.1f} %")
    longer = train(resume=run, epochs=3)
    assert (longer.path, longer.status["epoch"]) == (run.path, 3)
    again = train(run.config, epochs=1, out=str(tmp_path / "again"), resume=False)
    assert again.config.optim.epochs == 1
    assert Run(run.checkpoints[0]).path == run.path


# ---- a model of one's own --------------------------------------------------------------------------------------------


def test_the_encoders_are_made_of_the_model(own: Run, net: Net) -> None:
    assert own.config.model.arch == "own/Net"
    trained = load_file(own.checkpoints[-1])
    query = {n.removeprefix("model/query.backbone."): t for n, t in trained.items() if "query.backbone" in n}
    assert query.keys() == net.state_dict().keys()
    assert not torch.equal(query["first.weight"], net.first.weight)
    assert torch.equal(query["table"], net.get_buffer("table"))
    module, preprocess = own.backbone()
    copied = copy.deepcopy(net).eval()
    copied.load_state_dict(query)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(module(x), copied(x).mean(dim=(2, 3)))
    assert preprocess.side == 16


def test_it_begins_with_the_weights_of_the_model(net: Net, tmp_path: Path) -> None:
    run = train(model=net, **{**TINY, "epochs": 1, "lr": 1e-12}, out=tmp_path / "still")
    assert torch.equal(load_file(run.checkpoints[-1])["model/query.backbone.first.weight"], net.first.weight)


def test_resuming_needs_the_model_and_its_structure(own: Run, net: Net, tmp_path: Path) -> None:
    middle = own.checkpoints[0]
    resumed = train(model=net, resume_from=middle, out=tmp_path / "half")
    ours, expected = load_file(resumed.checkpoints[-1]), load_file(own.checkpoints[-1])
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    with pytest.raises(ConfigError, match=r"own/Net is a model of your own, which only Python can give"):
        train(resume=own)
    with pytest.raises(CheckpointError, match=r"first.weight") as caught:
        train(model=Net(16), resume_from=middle, out=tmp_path / "other")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="arch is 'own/Sequential' and was 'own/Net'"):
        train(model=nn.Sequential(nn.Conv2d(3, 4, 3)), resume_from=middle, out=tmp_path / "another")


def test_loading_needs_the_model_too(own: Run, net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"fastmoco.load_backbone\(RUN, model=Net\(\)\)"):
        load_backbone(own.path)
    module, _ = load_backbone(own.path, model=net)
    assert torch.equal(module.get_parameter("first.weight"), own.backbone()[0].get_parameter("first.weight"))
    with pytest.raises(CheckpointError, match="its tensors are not those of own/Net: table is"):
        load_backbone(own.path, model=Net(16))
    for command in (["eval"], ["export", "--to", "onnx", "-o", "b.onnx"]):
        assert main([*command, str(own.path)]) == 2
        assert "own/Net is a model of your own, which only Python can give" in capsys.readouterr().err


def test_it_is_evaluated_and_exported(own: Run, tmp_path: Path) -> None:
    metrics = evaluate(own, probes="knn", pictures=False, limit=64, device="cpu")
    assert metrics["backbone"]["feature_dim"] == 16
    assert metrics["probes"][0]["probe"] == "knn"
    with pytest.raises(ConfigError, match="timm builds no own/Net: use --to safetensors or onnx"):
        export(own, to="timm", path=tmp_path / "b.pth")
    file = export(own, to="safetensors")
    assert file == own.path / "own-safetensors.safetensors"
    assert load_file(file)["norm.num_batches_tracked"] == 8
    module, preprocess = load_backbone(file, model=own.model)
    assert torch.equal(module.get_parameter("first.weight"), own.backbone()[0].get_parameter("first.weight"))
    assert preprocess.side == 16
    file.unlink()


def test_the_report_says_how_to_go_on_in_python(own: Run, net: Net, tmp_path: Path) -> None:
    shutil.copytree(own.path, tmp_path / "own")
    first, report = commands(read_run(tmp_path / "own"))
    assert (first.language, report.text) == ("Python", f"fastmoco report {tmp_path}/own")
    assert "net = Net(...)" in first.text
    lines = first.text.replace("Net(...)", "given").replace(
        "evaluate(run)", "evaluate(run, probes='knn', limit=64, pictures=False)"
    )
    names: dict[str, Any] = {"given": net}
    exec(lines, names)
    assert names["run"].status["epoch"] == 4
    assert names["metrics"]["backbone"]["feature_dim"] == 16
    assert names["file"].is_file()
    assert names["backbone"](torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    for file in [names["file"], *(tmp_path / "own" / "checkpoints").iterdir()]:
        file.unlink()
    again, _ = commands(read_run(tmp_path / "own"))
    exec(again.text.replace("net = Net(...)", ""), names)
    assert Run(tmp_path / "own").status["state"] == "done"


@pytest.mark.slow
def test_it_is_exported_to_onnx(own: Run, tmp_path: Path, require_backend: Any) -> None:
    require_backend("onnx")
    assert export(own, to="onnx", path=tmp_path / "b.onnx").stat().st_size > 1000


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> Any:
        return [super().forward(x), x]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Frozen(), "first.weight of Frozen is frozen"),
        (TwoOutputs(), "TwoOutputs gives a list for two images, expected features (2, D) or (2, D, ...)"),
        (Net().double(), "the parameter first.weight of Net is torch.float64"),
        (nn.Identity(), "Identity has no parameters to train"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), "Sequential fails on images of [2, 3, 16, 16]"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.BatchNorm1d(4)), "BatchNorm1d"),
    ],
)
def test_models_that_cannot_be_trained_are_one_line(model: nn.Module, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(model=model, **TINY, out=tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(encode(picture(20 + i, 30), "PNG"))
    return tmp_path


def test_images_are_opened_as_in_training(photos: Path) -> None:
    values = (np.arange(30 * 20).reshape(20, 30) * 100).astype(np.uint16)
    Image.fromarray(values).save(photos / "a" / "0.png")
    images = open_images(photos)
    assert (len(images), images.classes, images.labels) == (4, ("a", "b"), [0, 0, 1, 1])
    assert [Path(path).relative_to(photos).as_posix() for path in images.paths] == [
        "a/0.png",
        "a/1.png",
        "b/0.png",
        "b/1.png",
    ]
    view, label = images[0]
    assert label == 0
    assert torch.equal(view, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)), "the high byte"
    assert images[-1][0].shape == (3, 21, 30)
    brighter = open_images(photos, value_range=(0.0, 30_000.0))
    assert brighter[0][0].float().mean() > 1.5 * view.float().mean()
    with pytest.raises(IndexError, match="no image 4 of 4"):
        images[4]
    assert len(open_images(photos, no_labels=True).classes) == 0


def test_images_are_batched_with_preprocessing(photos: Path, own: Run) -> None:
    module, preprocess = own.backbone()
    loader = torch.utils.data.DataLoader(open_images(photos, preprocess), 3)
    with torch.no_grad():
        features = torch.cat([module(views) for views, _ in loader])
    assert features.shape == (4, 16)
    with pytest.raises(ConfigError, match=r"split is 'test', and .* has train images"):
        open_images(photos, split="test")
    assert len(open_images("shapes", split="test", limit=20)) == 20
    assert json.loads(json.dumps(open_images(photos).labels)) == [0, 0, 1, 1]
