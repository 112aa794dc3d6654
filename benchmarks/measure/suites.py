"""The suites: scripts with their arguments and time limits.

Limits are somewhat longer than the time on an idle machine. Those of the cpu suite add up to 20 minutes on two cores,
those of a numbered part of the gpu suite to less than nine minutes on one H200. In a budget, the step comes first,
with its memory, then training from files and other trainers, then the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Suite = Literal["cpu", "gpu"]
DATA, OUT, SUITE_OUT = "{data}", "{out}", "{whole}"


@dataclass(frozen=True)
class Part:
    """A script to run; `name` is its folder.

    number     number of the group that runs in one session
    arguments  {data} is the folder of the images `needs`, {out} the part's folder and {whole} the suite's
    priority   the parts with the lowest come first in a budget
    after      benchmark whose result it reads; the part is skipped if there is none
    generated  whether it runs on generated images where no others are given
    again      run it even if it is done, because its input may have changed
    quick      arguments for --quick; they come last and override others
    """

    number: int
    name: str
    script: str
    arguments: tuple[str, ...]
    limit_s: float
    priority: int = 5
    needs: str | None = None
    after: str | None = None
    generated: bool = True
    again: bool = False
    quick: tuple[str, ...] = ("--quick",)


def _part(number: int, name: str, line: str, limit_s: float, **more: str | int | tuple[str, ...]) -> Part:
    """A part from a command line; the script writes to the part's folder."""
    script, *arguments = line.split()
    return Part(number, name, script, (*arguments, "--out", OUT), limit_s, **more)  # type: ignore[arg-type]


def _report(number: int, limit_s: float) -> Part:
    return Part(number, "report", "report.py", (SUITE_OUT,), limit_s, again=True, quick=())


def _accuracy(number: int, recipe: str, seed: int) -> Part:
    """One run of the authors' 200 epochs, which resumes after an interruption."""
    line = f"accuracy.py --data {DATA} --runs {OUT}/runs --recipes {recipe} --seeds {seed}"
    return _part(number, f"accuracy-{recipe}-seed{seed}", line, 530, priority=9, needs=CIFAR, generated=False)


CIFAR, IMAGENETTE = "cifar10", "imagenette"

CPU = (
    _part(
        1,
        "pipelines-cifar10",
        "loaders.py --data {data} --limit 5000 --crop-size 32 --batch-size 512 --seconds 1 --repetitions 3",
        95,
        needs=CIFAR,
    ),
    _part(
        2,
        "pipelines-imagenette",
        "loaders.py --data {data} --limit 1500 --crop-size 224 --batch-size 64 --no-colour --seconds 1.5"
        " --repetitions 3",
        75,
        needs=IMAGENETTE,
    ),
    _part(
        3,
        "pipelines-imagenette-views",
        "loaders.py --data {data} --limit 1000 --crop-size 224 --batch-size 64 --seconds 1.5 --repetitions 3",
        115,
        needs=IMAGENETTE,
    ),
    _part(4, "step", "step.py --suite cpu --repetitions 3", 360, priority=1),
    _part(
        5,
        "train",
        "train.py --config cifar --data {data} --limit 2500 --batch-size 64 --seconds 0.5 --repetitions 2",
        140,
        needs=CIFAR,
        priority=2,
    ),
    _part(
        6,
        "peers",
        "compare_peers.py --config cifar --data {data} --limit 2500 --batch-size 64 --seconds 0.5 --repetitions 2",
        160,
        needs=CIFAR,
        priority=2,
    ),
    _part(
        7,
        "accuracy",
        "accuracy.py --data {data} --runs {out}/runs --recipes cifar10-demo --seeds 0 --epochs 3 --limit 2500"
        " --width 0.25 --batch-size 32 --knn-every 1 --targets 28,30",
        60,
        priority=9,
        needs=CIFAR,
        generated=False,
    ),
    _part(
        8,
        "scaling",
        "scaling.py --config cifar --data {data} --limit 1000 --batch-size 16 --seconds 0.3 --repetitions 2",
        155,
        needs=CIFAR,
        quick=("--quick", "--batch-size", "8"),
        priority=6,
    ),
    _part(9, "roofline", "roofline.py --results {whole} --seconds 0.3", 20, after="step", priority=4),
    _report(10, 20),
)

GPU = (
    _part(1, "step", "step.py --suite gpu", 520, priority=1),
    _part(
        2,
        "pipelines-cifar10",
        "loaders.py --data {data} --crop-size 32 --batch-size 512 --seconds 3",
        260,
        needs=CIFAR,
    ),
    _part(
        2,
        "pipelines-imagenette",
        "loaders.py --data {data} --crop-size 224 --batch-size 256 --seconds 3",
        260,
        needs=IMAGENETTE,
    ),
    _part(
        3,
        "train-cifar10",
        "train.py --config cifar --data {data} --seconds 3",
        260,
        needs=CIFAR,
        priority=3,
    ),
    _part(
        3,
        "train-imagenette",
        "train.py --config r50 --data {data} --seconds 3 --repetitions 3",
        270,
        needs=IMAGENETTE,
        priority=2,
    ),
    _part(
        4,
        "peers-cifar10",
        "compare_peers.py --config cifar --data {data} --seconds 3 --repetitions 3",
        260,
        needs=CIFAR,
        priority=3,
    ),
    _part(
        4,
        "peers-imagenette",
        "compare_peers.py --config r50 --data {data} --seconds 3 --repetitions 3",
        270,
        needs=IMAGENETTE,
        priority=2,
    ),
    _part(5, "scaling-cifar10", "scaling.py --config cifar --data {data} --seconds 0.5", 260, needs=CIFAR, priority=6),
    _part(
        5,
        "scaling-imagenette",
        "scaling.py --config r50 --data {data} --seconds 0.5",
        270,
        needs=IMAGENETTE,
        priority=6,
    ),
    *(_accuracy(6 + seed, "cifar10-demo", seed) for seed in range(3)),
    *(_accuracy(9 + seed, "cifar10-demo-symmetric", seed) for seed in range(3)),
    _part(12, "roofline", "roofline.py --results {whole}", 120, after="step", priority=4),
    _report(12, 60),
)

SUITES: dict[Suite, tuple[Part, ...]] = {"cpu": CPU, "gpu": GPU}
