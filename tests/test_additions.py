"""What docs/architecture.md says of adding things is enough: its blocks, applied to a copy of the packages, train."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "architecture.md"
KINDS = {
    "An augmentation preset": ("--aug", "crop-only"),
    "A backend": ("--pipeline", "inline"),
    "A family of backbones": ("--arch", "convnet4"),
    "An objective": ("--objective", "triplet"),
    "An optimiser": ("--optimizer", "lion"),
}


class Block(NamedTuple):
    """Code of the guide: a new file, or lines for the registry of that name in an existing one."""

    path: str
    registry: str
    code: str


def blocks(kind: str) -> list[Block]:
    section = GUIDE.read_text(encoding="utf-8").partition(f"**{kind}**")[2].partition("\n**")[0]
    found = re.findall(r"```python\n# ([\w/.]+)(?:: (\w+))?\n(.*?)```", section, re.DOTALL)
    return [Block(*match) for match in found]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the two packages with all five additions."""
    folder = tmp_path_factory.mktemp("copy")
    for package in ("fastmoco", "pipelines"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in KINDS:
        for path, registry, code in blocks(kind):
            file = folder / path
            if not registry:
                assert not file.exists(), f"{path} is to be a new file"
                file.write_text(code, encoding="utf-8")
                continue
            text, count = re.subn(rf"^({registry} = [{{(])\n", rf"\1\n{code}", file.read_text(), flags=re.MULTILINE)
            assert count == 1, f"{path} has no {registry}"
            file.write_text(text, encoding="utf-8")
    return folder


def fastmoco(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastmoco", *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_three_files_at_most(kind: str) -> None:
    """The third is a test."""
    files = [block.path for block in blocks(kind)]
    assert 1 <= len(files) <= 2
    assert len(set(files)) == len(files)
    assert sum(bool(block.registry) for block in blocks(kind)) == 1


@pytest.mark.parametrize(("flag", "name"), KINDS.values())
def test_the_program_as_it_is_does_not_know_it(flag: str, name: str) -> None:
    done = fastmoco(ROOT, "train", flag, name)
    assert done.returncode == 2
    assert name in done.stderr


@pytest.mark.slow
def test_all_five_train_together(copy: Path) -> None:
    chosen = [word for pair in KINDS.values() for word in pair]
    few = ["--limit", "64", "--batch-size", "32", "--epochs", "8", "--lr", "0.001", "--moco-k", "64", "--device", "cpu"]
    done = fastmoco(copy, "train", *chosen, *few, "--out", "run", "--log-every", "1", "--no-tensorboard")
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((copy / "run" / "config.json").read_text())
    values = {f"--{name}": value for group in config.values() for name, value in group.items()}
    assert [values[flag] for flag in chosen[::2]] == chosen[1::2]
    losses = [json.loads(line).get("loss") for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[2:6]), "it learns, once the queue holds keys in place of random vectors"

    resumed = fastmoco(copy, "train", "--resume", "--out", "run", "--optimizer", "sgd")
    assert resumed.returncode == 4
    assert "optimizer is 'sgd' and was 'lion'" in resumed.stderr
    exported = fastmoco(copy, "export", "run", "--to", "safetensors", "-o", "b.safetensors")
    assert exported.returncode == 0, exported.stderr
    assert "convnet4" in exported.stdout
    refused = fastmoco(copy, "export", "run", "--to", "timm", "-o", "b.pth")
    assert refused.returncode == 2
    assert "timm builds no convnet4: use --to safetensors or onnx" in refused.stderr


@pytest.mark.slow
def test_help_and_errors_know_them(copy: Path) -> None:
    said = fastmoco(copy, "train", "--help-all").stdout
    for flag, name in KINDS.values():
        assert flag in said
        assert name in said
    assert "did you mean convnet4" in fastmoco(copy, "eval", "run", "--arch", "convnet5").stderr
    assert "did you mean inline" in fastmoco(copy, "views", "shapes", "--compare", "torch,inlin").stderr
