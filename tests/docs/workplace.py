"""A folder in which the documentation's commands run: small stand-ins under the names that the pages use.

`uv`, `pip`, `apt-get` and `torchrun` are replaced by scripts, so that nothing is installed: `uv run` runs, `uv sync`
checks its extras and groups against pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 72, 96
UV = """#!/bin/sh
case "$1" in
  run) shift; exec "$@" ;;
  sync|pip) exec {python} {root}/tests/docs/installed_names.py "$@" ;;
  *) echo "uv $1 is not known here" >&2; exit 2 ;;
esac
"""
NOTHING = "#!/bin/sh\nexit 0\n"


def photographs(folder: Path, classes: int, each: int, seed: int) -> None:
    """Coloured noise whose hue and grain are those of its class: folder/class_0/0.jpg, ..."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        colour = np.random.default_rng(label).integers(40, 200, 3)
        for number in range(each):
            coarse = rng.integers(-40, 40, (HEIGHT >> 2, WIDTH >> 2, 3)) + colour
            pixels = np.repeat(np.repeat(coarse, 4, 0), 4, 1) + rng.integers(-15, 16, (HEIGHT, WIDTH, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / f"class_{label}" / f"{number}.jpg", quality=90)


class Workplace:
    """`folder` is the current directory of the commands, and `folder`/home the home directory."""

    def __init__(self, folder: Path, run: Path | None = None) -> None:
        self.folder, self.home, self.programs = folder, folder / "home", folder / "programs"
        self.variables: list[str] = []  # assignments that later commands see, as in one shell
        for path in (self.home, self.programs):
            path.mkdir(parents=True)
        self._program("uv", UV.format(python=sys.executable, root=ROOT))
        for name in ("pip", "apt-get", "sudo"):
            self._program(name, NOTHING)
        for name in ("benchmarks", "tools", "pyproject.toml", "docs", "tests", "fastmoco", "pipelines"):
            (folder / name).symlink_to(ROOT / name)
        self._images()
        if run is not None:
            shutil.copytree(run, folder / "runs" / "NAME")

    def _program(self, name: str, script: str) -> None:
        (self.programs / name).write_text(script)
        (self.programs / name).chmod(0o755)

    def _images(self) -> None:
        """Two splits of three classes under ~, and the same unlabelled; single files."""
        split = self.home / "imagenet"
        photographs(split / "train", 3, 24, seed=0)
        photographs(split / "val", 3, 8, seed=1)
        for name in ("photos", "cifar10"):
            shutil.copytree(split, self.home / name)
        (self.home / "unlabelled").mkdir()
        for path in split.glob("train/*/*.jpg"):
            shutil.copy(path, self.home / "unlabelled" / f"{path.parent.name}_{path.name}")
        (self.home / "multispectral").mkdir()
        for number in range(40):
            bands = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
            np.save(self.home / "multispectral" / f"{number}.npy", bands)
        for name in ("PHOTOS", "IMAGES"):
            shutil.copytree(split, self.folder / name)
        shutil.copytree(split / "train", self.folder / "photos")
        shutil.copy(split / "val/class_0/0.jpg", self.folder / "new.jpg")

    def run(self, command: str | list[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """A line for sh, or arguments. Standard error goes to the output."""
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
        }
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            command if isinstance(command, list) else ["sh", "-ec", "\n".join([*self.variables, command])],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
            check=False,
        )
