"""How the documentation's commands are run by its tests: as they are, but for what stands here with its reason.

Training is shortened by flags that follow the others. A line that is not in these tables is run.
"""

from __future__ import annotations

import re

# Trainings take minutes to days: few images in small batches, one epoch; unless --arch is given, a narrow network.
FEW = "--limit 64 --batch-size 16 --moco-k 32 --log-every 1 --no-tensorboard"
NARROW = "--width 0.125"
ONE_EPOCH = "--epochs 1"
TRAINS = re.compile(r"\bfastmoco (train|sweep)\b(?!.*--(help|resume|config)\b)")

# Line of the documentation: what is run in its place.
INSTEAD: dict[str, tuple[str, str]] = {
    "uv run fastmoco train": (
        "fastmoco train --limit 512 --log-every 10 --overwrite",
        "an eighth of the images, and all else as it is: the page shows its output",
    ),
    "uv run fastmoco train --data ~/photos --init resnet50-imagenet.pth": (
        "fastmoco export runs/NAME --to torchvision -o resnet50-imagenet.pth && "
        "fastmoco train --data photos --init resnet50-imagenet.pth --limit 64 --batch-size 16 --moco-k 32 --epochs 1",
        "--width would contradict the file, for which an export of a narrow ResNet-18 stands in",
    ),
    "uv run fastmoco eval runs/NAME --probes knn,linear,logistic,few-label,fine-tune": (
        "fastmoco eval runs/NAME --probes knn,linear,logistic,few-label,fine-tune --labels 1-per-class "
        "--linear-epochs 2 --fine-tune-epochs 1 --fine-tune-batch-size 16",
        "1 % of the stand-in's labels are none; fine-tuning takes minutes",
    ),
    "uv run fastmoco sweep shapes --vary mechanism=queue,end-to-end,memory-bank $BEFORE --moco-m None --moco-k None": (
        "fastmoco sweep shapes --vary mechanism=queue,end-to-end,memory-bank $BEFORE --moco-m None --moco-k None "
        f"--limit 64 {NARROW} {ONE_EPOCH}",
        "each mechanism has its own number of keys",
    ),
    "uv run fastmoco train cifar10-demo --out runs/cifar10": (
        f"fastmoco train cifar10-demo --data ~/cifar10 --out runs/cifar10 {FEW} {NARROW} {ONE_EPOCH}",
        "nothing is downloaded",
    ),
    "uv run fastmoco train --resume runs/cifar10 --epochs 400": (
        "fastmoco train --resume runs/cifar10 --epochs 2",
        "an epoch more than the shortened run had",
    ),
    "uv run fastmoco train --data PHOTOS --gpus 8": (
        f"fastmoco train --data PHOTOS --gpus 2 --arch resnet18 --out runs/gpus {FEW} {ONE_EPOCH}",
        "two processes on a CPU",
    ),
    "torchrun --nproc-per-node 8 -m fastmoco train --data PHOTOS": (
        "torchrun --nproc-per-node 2 -m fastmoco train --data PHOTOS --arch resnet18 --out runs/torchrun "
        f"{FEW} {ONE_EPOCH}",
        "two processes on a CPU",
    ),
}

# Line of the documentation: why it is not run. Its flags must be in --help, and its files exist.
ONLY_CHECKED: dict[str, str] = {
    "uv run tensorboard --logdir runs": "a server, which does not end",
    "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
    "-m fastmoco train --data PHOTOS": "four machines; tests/distributed starts two on private networks",
    "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
    "-m fastmoco train imagenet-v2 --data /data/imagenet --out /runs/moco": "the same",
}

# Files of commands that tests run at length elsewhere.
TESTED_SCRIPTS = {
    "benchmarks/": "tests/benchmarks runs the scripts; as they stand here they take minutes",
    "pytest": "the tests do not run themselves",
    "ruff": ".ci/run checks the sources",
    "pyright": ".ci/run checks the sources",
    "mkdocs": "tests/docs/test_site.py builds the site",
}

# Part of a command: the package, of tests/conftest.py, without which the rest of its page is skipped.
NEEDS: dict[str, str] = {
    "mkdocs": "site",
    "--pipeline dali": "dali",
    "--pipeline ffcv": "ffcv",
    "--to onnx": "onnx",
    ".parquet": "parquet",
    "--wandb": "wandb",
    "--mlflow": "mlflow",
}

# First line, single-spaced, of a `text` block that is not output of the commands of its page: what it is.
NOT_PRINTED_HERE: dict[str, str] = {
    "step on R GPUs = T + last bucket of gradients ready only at the end of the backward": "formulas",
    "python main_moco.py -a resnet50 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos \\": (
        "a command of another trainer"
    ),
    "processor ok AMD EPYC: 2 of 2 cores, avx2 avx512f avx512_bf16": "of one machine",
}


def reason_not_run(command: str) -> str | None:
    """Why a line is only checked, or None if it is run."""
    if command in ONLY_CHECKED:
        return ONLY_CHECKED[command]
    return next((reason for name, reason in TESTED_SCRIPTS.items() if name in command.split("#")[0]), None)


def as_run(command: str) -> str:
    """The line that is run for a line of the documentation."""
    if command in INSTEAD:
        return INSTEAD[command][0]
    if not TRAINS.search(command):
        return command
    narrow = "" if "--arch" in command else NARROW
    return " ".join(f"{command} {FEW} {narrow} {ONE_EPOCH}".split())
