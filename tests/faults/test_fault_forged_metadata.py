"""Checkpoints with the right hash whose text says something impossible."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastmoco import load_backbone
from fastmoco.cli import main
from fastmoco.errors import CheckpointError, ExitCode
from fastmoco.run import checkpoint
from fastmoco.run.checkpoint_meta import CheckpointMeta
from tests.run.test_train import RESIDENT

QUICK = [*RESIDENT, "--epochs", "1", "--knn-every", "0", "--no-tensorboard", "--cpu-threads", "1", "--check", "off"]
ABSENT = object()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, and a checkpoint of the last."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *QUICK, "--keep-checkpoints", "1", "--out", str(out)]) == ExitCode.DONE
    return out


def forged(finished: Path, out: Path, change: dict[str, Any], *, step: int = 4) -> tuple[Path, Path]:
    """A copy of the run, and its checkpoint with other text and the hash of that."""
    shutil.copytree(finished, out)
    (path,) = (out / "checkpoints").glob("*.safetensors")
    meta = checkpoint.verify(path)
    tensors = load_file(path)
    for name, value in change.items():
        if name.startswith("config."):
            meta["config"] |= {name.removeprefix("config."): value}
        else:
            meta[name] = value
    meta = {name: value for name, value in meta.items() if value is not ABSENT}
    shutil.rmtree(out / "checkpoints")
    return out, checkpoint.save(out / "checkpoints", step, tensors, meta)


FORGERIES = {
    "no step": ({"step": ABSENT}, "step is None"),
    "a negative step": ({"step": -1}, "step is -1"),
    "a textual step": ({"step": "4"}, "step is '4'"),
    "a fractional step": ({"step": 4.0}, "step is 4.0"),
    "a true step": ({"step": True}, "step is True"),
    "a step that is not that of the name": ({"step": 3}, "expected the 4 of its name"),
    "no data": ({"data": ABSENT}, "data is None"),
    "a list as data": ({"data": ["x"]}, "data is ['x']"),
    "a number as the content of the data": ({"data_content": 7}, "data_content is 7"),
    "a list as images": ({"images": [1]}, "images is [1]"),
    "images without a number": ({"images": {"sizes": "0" * 16}}, "expected the hashes of the images"),
    "no versions": ({"versions": ABSENT}, "versions is None"),
    "numbers as versions": ({"versions": {"torch": 2}}, "versions is {'torch': 2}"),
    "no config": ({"config": ABSENT}, "config is None"),
    "a list as config": ({"config": ["lr"]}, "config is ['lr']"),
    "an empty config": ({"config": {}}, "--workers is None"),
    "a config with an unknown field": ({"config.\x1b[2J": 1}, r"no field '\x1b[2J'"),
    "a config with a value of another type": ({"config.lr": "high"}, "--lr is 'high'"),
    "a config with an impossible value": ({"config.epochs": -3}, "--epochs is -3"),
    "a config with nested lists": ({"config.head": [[[1]]]}, "--head is ([[1]],)"),
}


@pytest.mark.parametrize(("change", "words"), FORGERIES.values(), ids=FORGERIES)
def test_forged_metadata_is_refused(
    change: dict[str, Any], words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that says something impossible of itself is refused by every command, with exit code 4, in ."""
    run, path = forged(finished, tmp_path / "run", change)
    capsys.readouterr()
    for command in (
        ["train", *QUICK, "--resume", "--out", str(run)],
        ["export", str(run), "--to", "torchvision", "-o", str(tmp_path / "out.pth")],
        ["eval", str(path), "--out", str(tmp_path / "eval"), "--device", "cpu", "--data", "shapes"],
    ):
        assert main(command) == ExitCode.CHECKPOINT, command
        (line,) = capsys.readouterr().err.splitlines()
        assert path.name in line
        assert words in line
    with pytest.raises(CheckpointError):
        load_backbone(path)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("step", [5, 10**12])
def test_a_step_after_the_last_is_refused(
    step: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint from after the last step of the run is refused with exit code 4, not taken for a finished run."""
    run, path = forged(finished, tmp_path / "run", {"step": step}, step=step)
    capsys.readouterr()
    assert main(["train", *QUICK, "--resume", "--out", str(run)]) == ExitCode.CHECKPOINT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is from step {step:,}" in line
    assert "--epochs" in line


def test_a_checkpoint_under_another_name_is_read(finished: Path, tmp_path: Path) -> None:
    """A checkpoint that was copied under another name, with its hash, is still read."""
    (path,) = (finished / "checkpoints").glob("*.safetensors")
    shutil.copy(path, tmp_path / "best.safetensors")
    digest = path.with_name(path.name + ".sha256").read_text().replace(path.name, "best.safetensors")
    (tmp_path / "best.safetensors.sha256").write_text(digest)
    best = tmp_path / "best.safetensors"
    assert CheckpointMeta.of(best, checkpoint.verify(best)).step == 4
    load_backbone(best)
