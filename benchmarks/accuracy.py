"""Time to accuracy: training minutes until kNN on CIFAR-10 reaches the accuracy of the authors' demo after 200 epochs.

Both are on the encoder's output (`knn_output_top1_percent`).

    uv run python benchmarks/accuracy.py --data cifar10 --out DIR
    uv run python benchmarks/accuracy.py --data cifar10.tar.xz --seeds 0 --recipes cifar10-demo     # one run of the six
    uv run python benchmarks/accuracy.py --epochs 20 --width 0.25 --limit 10000 --batch-size 128 --targets 35,40
    uv run python benchmarks/accuracy.py --quick

The runs are those of `fastmoco train RECIPE --seed N`. A target is reached at the first evaluation with that accuracy,
so `--knn-every` is the resolution; for targets that are not reached, the best accuracy is reported. After an
interruption, the same command with the same --runs resumes; completed runs are only read.
"""

from __future__ import annotations

import gc
import os
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure.archives import CACHE, unpacked
from benchmarks.measure.harness import environment, parse_names, run_script
from benchmarks.measure.learning_curve import Evaluation, Sessions, draw, evaluations, first_at
from benchmarks.measure.turns import reason, save
from benchmarks.reporting.page import make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.config import FREE_ON_RESUME, RunConfig, differences
from fastmoco.console import say
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError, Preempted
from fastmoco.recipes import recipe
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.metrics import read_metrics
from fastmoco.trainer import train

PUBLISHED = {"cifar10-demo": (80.0, 82.6), "cifar10-demo-symmetric": (85.3,)}  # after 200 epochs, in the notebook


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Training minutes until kNN on CIFAR-10 reaches the published accuracy, with the authors' hyper-parameters."""

    data: str | None = None
    """A folder of CIFAR-10 images, a tar file, or a named data set. Unset: cifar10, which is downloaded."""
    recipes: str = ",".join(PUBLISHED)
    """Names of recipes, separated by commas."""
    seeds: str = "0,1,2"
    """Seeds, separated by commas: one run each per recipe."""
    targets: str | None = None
    """Accuracies in percent, separated by commas. Unset: the published ones."""
    epochs: int | None = None
    """Another number of epochs than the recipe's 200."""
    limit: int | None = None
    """Number of images to train and evaluate on. Unset: all."""
    width: float = 1.0
    """Factor on the channels of the encoder."""
    batch_size: int | None = None
    """Another number of images per step; scales the learning rate."""
    knn_every: int = 5
    """Epochs between evaluations."""
    runs: Path = Path("runs/accuracy")
    """Folder of the runs; runs that are there are resumed or read."""
    cache: str = CACHE
    """Folder for unpacked tar files and downloaded data sets."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """Two epochs of a small encoder on generated shapes with one seed, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file and the picture."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Train the missing runs, print a table, write the result and return it. A stopped invocation reports what it has.

    Raises ConfigError; the error of the last run if all of them fail; Preempted after a signal.
    """
    console = console or make_console()
    if settings.quick:
        small = {"data": settings.data or "shapes", "seeds": settings.seeds.split(",")[0], "knn_every": 1}
        small |= {"epochs": settings.epochs or 2, "limit": settings.limit or 512, "width": 0.25, "batch_size": 32}
        settings = replace(settings, **small)
    seeds = [int(seed) for seed in _numbers("--seeds", settings.seeds)]
    targets = _targets(settings)
    data = unpacked(settings.data or "cifar10", settings.cache)
    assert data is not None
    configs = {(name, seed): _config(settings, name, seed, data) for name in targets for seed in seeds}
    result: dict[str, Any] = {
        "benchmark": "accuracy",
        "environment": environment(pick_device(settings.device)),
        "settings": asdict(settings) | {"out": None, "runs": str(settings.runs)},
        "recipes": {},
        "left_out": {},
    }
    path = None if settings.out is None else settings.out / "accuracy.json"
    for config in configs.values():
        _check_same(config)
    stopped: Preempted | None = None
    failure: Exception | None = None
    for number, ((name, seed), config) in enumerate(configs.items(), start=1):
        say(console, f"{name}, seed {seed} ({number} of {len(configs)})", "bold")
        try:
            _complete(config, console)
        except Preempted as error:
            stopped = error
        except Exception as error:
            failure = error
            result["left_out"][f"{name}, seed {seed}"] = reason(error)
        result["recipes"] = _results(configs, targets, seeds)
        save(path, result, number - (stopped is not None), len(configs))
        if stopped is not None:
            break
    print_blocks(console, section(result))
    if settings.out is not None:
        curves = {
            name: {seed: [Evaluation(*e) for e in run["evaluations"]] for seed, run in of_recipe["runs"].items()}
            for name, of_recipe in result["recipes"].items()
        }
        draw(curves, targets, settings.out / "accuracy.png")
    if stopped is not None:
        raise stopped
    if failure is not None and len(result["left_out"]) == len(configs):
        raise failure
    return result


def _results(
    configs: dict[tuple[str, int], RunConfig], targets: dict[str, tuple[float, ...]], seeds: list[int]
) -> dict[str, Any]:
    """The runs of every recipe so far, and when they reached its targets."""
    results = {}
    for name, percents in targets.items():
        runs = {seed: _read(configs[name, seed]) for seed in seeds}
        results[name] = {"targets": [_reached(p, runs) for p in percents], "runs": runs}
    return results


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text} is not a list of numbers: expected something like 1,2,3") from None
    if flag == "--seeds" and any(number != int(number) for number in numbers):
        raise ConfigError(f"{flag} {text}: a seed is a whole number")
    return list(dict.fromkeys(numbers))


def _targets(settings: Settings) -> dict[str, tuple[float, ...]]:
    """Targets of every requested recipe."""
    names = parse_names(settings.recipes, tuple(PUBLISHED), "--recipes")
    given = None if settings.targets is None else tuple(_numbers("--targets", settings.targets))
    return {name: PUBLISHED[name] if given is None else given for name in names}


def _config(settings: Settings, name: str, seed: int, data: str) -> RunConfig:
    """The recipe; if it is made smaller, settings that depend on the size are left for the trainer to choose."""
    config = recipe(name)
    epochs = settings.epochs or config.optim.epochs
    config = config.replace(
        data=data,
        data_root=settings.cache,
        seed=seed,
        epochs=epochs,
        width=settings.width,
        limit=settings.limit,
        knn_every=settings.knn_every,
        device=settings.device,
        out=str(settings.runs / f"{name}-{epochs}ep-seed{seed}"),
    )
    if settings.limit is not None:
        config = config.replace(moco_k=None)
    if settings.batch_size not in (None, config.optim.batch_size):
        config = config.replace(batch_size=settings.batch_size, lr=None, bn_splits=None)
    return config


def _complete(config: RunConfig, console: Console) -> None:
    """Train or resume a run to its end. Raises the errors of `train`."""
    folder = _folder(config)
    if _state(folder) == "done":
        say(console, f"done before, in {folder}")
        return
    resume = any((folder / "checkpoints").glob("step-*.safetensors"))
    sessions = Sessions(folder)
    if not resume:
        sessions.reset()
    begun = (folder / "config.json").is_file() or (folder / "status.json").is_file()
    try:
        with sessions.record():
            train(config.replace(resume=resume, overwrite=begun and not resume), console)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _folder(config: RunConfig) -> Path:
    assert config.run.out is not None
    return Path(config.run.out)


def _state(folder: Path) -> str:
    return read_status(folder)["state"] if (folder / "status.json").is_file() else "not begun"


def _check_same(requested: RunConfig) -> None:
    """Raise ConfigError if its folder has a run with other settings; automatic ones may have any value."""
    folder = _folder(requested)
    if not (folder / "config.json").is_file():
        return
    existing = read_config(folder)
    for name, wanted, actual in differences(requested, existing):
        if name in FREE_ON_RESUME or wanted in (None, "auto"):
            continue
        if name == "data" and os.path.abspath(wanted) == os.path.abspath(actual):
            continue
        raise ConfigError(
            f"{folder} holds a run with {name} {actual}, and {wanted} was requested: choose another folder with --runs"
        )


def _read(config: RunConfig) -> dict[str, Any]:
    """State and results of a run, complete or not."""
    folder = _folder(config)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        return {"state": "not begun", "evaluations": [], "best_percent": None, "final_percent": None}
    resolved, records = read_config(folder), read_metrics(folder / "metrics.jsonl")
    assert isinstance(resolved.optim.batch_size, int)
    curve = evaluations(records, resolved.optim.batch_size)
    rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    seconds = Sessions(folder).seconds()
    state = _state(folder)
    return {
        "state": state,
        "evaluations": curve,
        "best_percent": max((e.knn_percent for e in curve), default=None),
        "final_percent": curve[-1].knn_percent if curve and state == "done" else None,
        "training_minutes": curve[-1].training_minutes if curve else 0.0,
        "wall_minutes": sum(seconds) / 60,
        "sessions": len(seconds),
        "images_per_s": statistics.median(rates) if rates else None,
        "config": resolved.flat(),
    }


def _reached(percent: float, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """When each seed reached a target, or null; the median if all have."""
    first = {seed: first_at(run["evaluations"], percent) for seed, run in runs.items()}
    minutes = [evaluation.training_minutes for evaluation in first.values() if evaluation is not None]
    return {
        "percent": percent,
        "epochs": {seed: None if e is None else e.epoch for seed, e in first.items()},
        "training_minutes": {seed: None if e is None else e.training_minutes for seed, e in first.items()},
        "reached_by": len(minutes),
        "seeds": len(first),
        "median_training_minutes": statistics.median(minutes) if len(minutes) == len(first) else None,
    }


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
