"""Time to accuracy: minutes until kNN on CIFAR-10 reaches what the authors' demo reaches after 200 epochs.

    uv run python benchmarks/accuracy.py --data cifar10 --out benchmarks/results
    uv run python benchmarks/accuracy.py --data cifar10.tar.xz --seeds 0 --recipes cifar10-demo     # one run of the six
    uv run python benchmarks/accuracy.py --epochs 20 --width 0.25 --limit 10000 --batch-size 128 --targets 35,40
    uv run python benchmarks/accuracy.py --quick

The runs are those of `fastmoco train RECIPE --seed N`, by the real trainer. A target counts as reached at the first
evaluation that shows it, so `--knn-every` is the resolution; one that is never reached is stated as such, with the best
accuracy there was. An invocation that was stopped or killed goes on where it was when it is started again with the same
--runs, and runs that are done are only read.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import gc
import os
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure.archives import CACHE, unpacked
from benchmarks.measure.harness import environment, make_console, run_script, short, show, write_json
from benchmarks.measure.learning_curve import Evaluation, Sessions, draw, evaluations, first_at
from fastmoco.config import FREE_ON_RESUME, RunConfig, differences
from fastmoco.console import say
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError, Preempted
from fastmoco.recipes import recipe
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.metrics import read_metrics
from fastmoco.train import train

PUBLISHED = {"cifar10-demo": (80.0, 82.6), "cifar10-demo-symmetric": (85.3,)}  # after 200 epochs, in the notebook


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Minutes of training until kNN on CIFAR-10 is as good as published, with the authors' hyper-parameters."""

    data: str | None = None
    """A folder of CIFAR-10's images, a tar file of it, or a named data set. Unset: cifar10, which is downloaded."""
    recipes: str = ",".join(PUBLISHED)
    """Which, separated by commas."""
    seeds: str = "0,1,2"
    """A run for each, of every recipe."""
    targets: str | None = None
    """Accuracies in percent, separated by commas. Unset: the published ones."""
    epochs: int | None = None
    """Another number than the recipe's 200."""
    limit: int | None = None
    """Train and evaluate on so many images only."""
    width: float = 1.0
    """Factor on the channels of the encoder."""
    batch_size: int | None = None
    """Another number of images a step; the learning rate is scaled with it."""
    knn_every: int = 5
    """Epochs between two evaluations."""
    runs: Path = Path("runs/accuracy")
    """Folder of the runs: what is done or begun there is not done again."""
    cache: str = CACHE
    """Where tar files are unpacked to and named data sets downloaded."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """Two epochs of a small encoder on drawn shapes, one seed: whether it works."""
    out: Path | None = None
    """Folder for the JSON file and the picture."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Trains what is not yet trained, prints a table and returns what it writes; what there is, also when stopped.

    Raises ConfigError, DataError, CheckpointError, DivergedError and DeviceError; Preempted after a signal.
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
    found_there = environment(pick_device(settings.device))
    stopped: Preempted | None = None
    for number, ((name, seed), config) in enumerate(configs.items(), start=1):
        say(console, f"{name}, seed {seed} ({number} of {len(configs)})", "bold")
        try:
            _finish(config, console)
        except Preempted as error:
            stopped = error
            break
    result: dict[str, Any] = {
        "benchmark": "accuracy",
        "environment": found_there,
        "settings": asdict(settings) | {"out": None, "runs": str(settings.runs)},
        "recipes": {},
    }
    for name, percents in targets.items():
        runs = {seed: _read(configs[name, seed]) for seed in seeds}
        result["recipes"][name] = {"targets": [_reached(p, runs) for p in percents], "runs": runs}
    _show(console, result)
    if settings.out is not None:
        write_json(settings.out / "accuracy.json", result)
        curves = {
            name: {seed: [Evaluation(*e) for e in run["evaluations"]] for seed, run in one["runs"].items()}
            for name, one in result["recipes"].items()
        }
        draw(curves, targets, settings.out / "accuracy.png")
    if stopped is not None:
        raise stopped
    return result


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text} is not a list of numbers: expected some separated by commas, 1,2,3") from None
    if flag == "--seeds" and any(number != int(number) for number in numbers):
        raise ConfigError(f"{flag} {text}: a seed is a whole number")
    return list(dict.fromkeys(numbers))


def _targets(settings: Settings) -> dict[str, tuple[float, ...]]:
    """Of every recipe that was requested."""
    names = list(dict.fromkeys(name.strip() for name in settings.recipes.split(",") if name.strip()))
    for name in names:
        if name not in PUBLISHED:
            raise ConfigError(f"--recipes {name} is unknown: expected some of {','.join(PUBLISHED)}")
    if not names:
        raise ConfigError(f"--recipes is empty: name some of {','.join(PUBLISHED)}")
    given = None if settings.targets is None else tuple(_numbers("--targets", settings.targets))
    return {name: PUBLISHED[name] if given is None else given for name in names}


def _config(settings: Settings, name: str, seed: int, data: str) -> RunConfig:
    """The recipe; where it is made smaller, what depends on the size is left open for the trainer to fill in."""
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


def _finish(config: RunConfig, console: Console) -> None:
    """Trains a run from where it is to its end. Raises what `train` raises."""
    folder = _folder(config)
    if (folder / "config.json").is_file():
        _check_same(config, read_config(folder), folder)
    if _state(folder) == "done":
        say(console, f"done before, in {folder}")
        return
    resume = any((folder / "checkpoints").glob("step-*.safetensors"))
    sessions = Sessions(folder)
    if not resume:
        sessions.forget()
    begun = (folder / "config.json").is_file() or (folder / "status.json").is_file()
    try:
        with sessions.one():
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


def _check_same(wanted: RunConfig, there: RunConfig, folder: Path) -> None:
    """Refuse a run with other settings than those asked for; open ones have been filled in there."""
    for name, asked, found in differences(wanted, there):
        if name in FREE_ON_RESUME or asked in (None, "auto"):
            continue
        if name == "data" and os.path.abspath(asked) == os.path.abspath(found):
            continue
        raise ConfigError(
            f"{folder} holds a run with {name} {found}, and {asked} was requested: choose another folder with --runs"
        )


def _read(config: RunConfig) -> dict[str, Any]:
    """What a run has come to, done or not."""
    folder = _folder(config)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        return {"state": "not begun", "evaluations": [], "best_percent": None, "final_percent": None}
    resolved, records = read_config(folder), read_metrics(folder / "metrics.jsonl")
    assert resolved.optim.batch_size is not None
    found = evaluations(records, resolved.optim.batch_size)
    rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    seconds = Sessions(folder).seconds()
    state = _state(folder)
    return {
        "state": state,
        "evaluations": found,
        "best_percent": max((e.knn_percent for e in found), default=None),
        "final_percent": found[-1].knn_percent if found and state == "done" else None,
        "training_minutes": found[-1].training_minutes if found else 0.0,
        "wall_minutes": sum(seconds) / 60,
        "sessions": len(seconds),
        "images_per_s": statistics.median(rates) if rates else None,
        "config": resolved.flat(),
    }


def _reached(percent: float, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """When each seed reached a target, null where it has not; the median where all have."""
    first = {seed: first_at(run["evaluations"], percent) for seed, run in runs.items()}
    minutes = [evaluation.training_minutes for evaluation in first.values() if evaluation is not None]
    everyone = len(minutes) == len(first)
    return {
        "percent": percent,
        "epochs": {seed: None if e is None else e.epoch for seed, e in first.items()},
        "training_minutes": {seed: None if e is None else e.training_minutes for seed, e in first.items()},
        "reached_by": len(minutes),
        "seeds": len(first),
        "median_training_minutes": statistics.median(minutes) if everyone else None,
    }


def _show(console: Console, result: dict[str, Any]) -> None:
    for name, one in result["recipes"].items():
        rows = []
        for seed, run in one["runs"].items():
            if run["state"] == "not begun":
                rows.append((f"seed {seed}", *["–"] * len(one["targets"]), "–", "–", "–", "–", "–", run["state"]))
                continue
            best = run["best_percent"]
            rows.append(
                (
                    f"seed {seed}",
                    *(_when(target, seed) for target in one["targets"]),
                    "–" if best is None else f"{best:.2f} %",
                    "–" if run["final_percent"] is None else f"{run['final_percent']:.2f} %",
                    short(run["training_minutes"]),
                    short(run["wall_minutes"]),
                    "–" if run["images_per_s"] is None else short(run["images_per_s"]),
                    run["state"],
                )
            )
        medians = [
            f"not by {t['seeds'] - t['reached_by']} of {t['seeds']}"
            if t["median_training_minutes"] is None
            else f"{short(t['median_training_minutes'])} min"
            for t in one["targets"]
        ]
        rows.append(("median", *medians, *[""] * 6))
        targets = (f"to {target['percent']:g} %" for target in one["targets"])
        columns = ("run", *targets, "best", "at the end", "training min", "wall min", "images/s", "state")
        every, device = result["settings"]["knn_every"], result["environment"]
        note = "minutes of training, without evaluations and checkpoints; evaluated "
        note += "every epoch" if every == 1 else f"every {every} epochs"
        show(console, f"time to accuracy, {name}, {device['gpu'] or device['cpu']}", columns, rows, note)


def _when(target: dict[str, Any], seed: int) -> str:
    minutes = target["training_minutes"][seed]
    return "not reached" if minutes is None else f"{short(minutes)} min, epoch {target['epochs'][seed]}"


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
