"""A program of the tests: reads a folder of images one of which is on a disk that does not answer.

unshare -m python hung_disk.py READER FOLDER SCRATCH
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.trainer import Trainer
from pipelines import reads
from pipelines.augment.presets import V1
from pipelines.backends.torch import TorchCrops
from pipelines.data.dataset import load_dataset
from pipelines.errors import DataError
from pipelines.plan.planner import Planner

LIMIT_S = 5.0
TINY = ["--batch-size", "8", "--bn-splits", "2", "--moco-k", "8", "--width", "0.125", "--epochs", "2", "--arch"]
TINY += ["resnet18", "--crop-size", "8", "--amp", "fp32", "--device", "cpu", "--cpu-threads", "1"]


def mount_hung_disk(path: Path) -> None:
    """Mounts a file system in user space whose program answers nothing."""
    path.mkdir()
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None, use_errno=True).mount(b"hung", os.fsencode(path), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def hang(image: Path, scratch: Path) -> None:
    mount_hung_disk(scratch / "disk")
    image.unlink()
    image.symlink_to(scratch / "disk" / image.name)


def train(folder: Path, scratch: Path) -> int:
    """Trains until an image hangs that was good when it was indexed."""
    steps = Trainer._steps

    def hang_then_train(self: Trainer) -> None:
        hang(folder / "07.jpg", scratch)
        steps(self)

    Trainer._steps = hang_then_train
    out = str(scratch / "run")
    return main(["train", *TINY, "--pipeline", "torch", "--workers", "0", "--data", str(folder), "--out", out])


def worker(folder: Path, scratch: Path) -> int:
    """Reads in a worker process an image that hangs after it was indexed."""
    index = load_dataset(str(folder), data_root=scratch).train
    hang(folder / "07.jpg", scratch)
    planner = Planner(index.sizes, seed=0, batch_size=len(index), augmentation=V1, shuffle_keys=False)
    try:
        list(TorchCrops(index, 8, torch.device("cpu"), 1).crops(planner.plans(0, 1)))
    except DataError as error:
        print(error, file=sys.stderr)
        return ExitCode.DATA
    return ExitCode.DONE


def run(reader: str, folder: Path, scratch: Path) -> int:
    if reader == "train":
        return train(folder, scratch)
    if reader == "worker":
        return worker(folder, scratch)
    hang(folder / "07.jpg", scratch)
    if reader == "index":
        return main(["train", "--data", str(folder), "--out", str(scratch / "run"), "--device", "cpu"])
    return main(["scan", str(folder), "--workers", "0" if reader == "scan" else "1"])


if __name__ == "__main__":
    reads.LIMIT_S = LIMIT_S
    code = run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(code)
