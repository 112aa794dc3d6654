"""A long run of tiny steps that is killed at random moments: what is lost, and what grows.

    uv run python benchmarks/soak.py --out DIR                        # 10,000 steps, 200 kills
    uv run python benchmarks/soak.py --quick

One run is trained without interruption in one process, whose memory, file descriptors and threads are sampled: `growth`
compares the last quarter of its time with the second. Another is killed with SIGKILL at random moments (during starts,
steps, saves and the deletion of earlier checkpoints) and resumed each time. After each kill the newest checkpoint that
verifies must not be older than before, and at the end weights, statistics, queue and optimiser must equal those of the
first run bit for bit, and so must the metrics of every step. Runs are forked from a process that has imported torch.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from safetensors.torch import load_file

from benchmarks.measure.harness import environment, run_script, write_json
from fastmoco.cli import main as fastmoco
from fastmoco.errors import DeviceError, ExitCode
from fastmoco.run import checkpoint
from fastmoco.run.metrics import read_metrics

TINY = (
    "--data shapes --limit 64 --arch resnet18 --width 0.125 --stem cifar --crop-size 16 --batch-size 16 --moco-k 32 "
    "--bn-splits 1 --amp fp32 --cpu-threads 1 --workers 1 --deterministic --check off --tune off --knn-every 0 "
    "--no-tensorboard --log-every 25 --device cpu"
)
EPOCH = 4  # steps
SHM = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Kill a run at random moments, resume it, and compare it with one that was left alone."""

    steps: int = 10_000
    """Steps of both runs, a multiple of 4."""
    kills: int = 200
    """Number of SIGKILLs."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    pipeline: str = "resident"
    """The pipeline of both runs."""
    seconds: float = 2.0
    """A run is killed at most as long after its first new checkpoint; every fourth at most as long after its start."""
    seed: int = 0
    """Seed of the moments."""
    quick: bool = False
    """A few steps and kills, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings) -> dict[str, Any]:
    """Run, print what was found, write it and return it. Raises DeviceError if anything was lost."""
    if settings.quick:
        settings = replace(settings, steps=120, kills=3, seconds=1.0)
    with tempfile.TemporaryDirectory(prefix="fastmoco-soak-") as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        growth = _left_alone(alone, settings)
        kills = _killed(killed, settings)
        lost = _differences(alone, killed)
    result = {
        "benchmark": "soak",
        "environment": environment(torch.device("cpu")),
        "settings": asdict(settings) | {"out": None},
        "growth": growth,
        "kills": kills,
        "lost": lost,
    }
    for name, (before, after) in growth.items():
        print(f"{name}: {before:,.0f} in the second quarter of the run, {after:,.0f} in the last")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in kills.items()))
    print(f"lost: {', '.join(lost) or 'nothing'}")
    if settings.out is not None:
        write_json(settings.out / "soak.json", result)
    if lost:
        raise DeviceError(f"a run that was killed differs from one that was left alone: {', '.join(lost)}")
    return result


# ---- processes -------------------------------------------------------------------------------------------------------


def _train(arguments: list[str], log: str) -> None:
    """One process of a run, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    code = fastmoco(arguments)
    raise SystemExit(code)


def _start(out: Path, settings: Settings, *, resume: bool) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.soak", "fastmoco.trainer"])
    flags = ["--out", str(out), "--epochs", str(settings.steps // EPOCH), "--pipeline", settings.pipeline]
    flags += ["--checkpoint-every", str(settings.checkpoint_every), *(["--resume"] if resume else [])]
    process = context.Process(target=_train, args=(["train", *TINY.split(), *flags], f"{out}.log"))
    process.start()
    return process


def _check_done(process: ForkServerProcess, out: Path) -> None:
    if process.exitcode != ExitCode.DONE:
        output = Path(f"{out}.log").read_text(encoding="utf-8").strip().splitlines()
        raise DeviceError(f"a run ended with exit code {process.exitcode}: {' '.join(output[-2:])}")


# ---- a run that is left alone ----------------------------------------------------------------------------------------


def _left_alone(out: Path, settings: Settings) -> dict[str, tuple[float, float]]:
    """{resource: medians of the second and of the last quarter}."""
    process = _start(out, settings, resume=False)
    watched = psutil.Process(process.pid)
    samples: list[dict[str, float]] = []
    while process.is_alive():
        with suppress(psutil.Error, OSError):
            samples.append(_resources(watched))
        process.join(0.1)
    _check_done(process, out)
    quarter = max(1, len(samples) // 4)
    second, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    return {name: tuple(statistics.median(s[name] for s in part) for part in (second, last)) for name in samples[0]}  # type: ignore[misc]


def _resources(process: psutil.Process) -> dict[str, float]:
    return {
        "resident_mb": process.memory_info().rss / 2**20,
        "file_descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


# ---- a run that is killed --------------------------------------------------------------------------------------------


def _killed(out: Path, settings: Settings) -> dict[str, Any]:
    """Kill and resume a run, let it end, and count. Raises DeviceError if a checkpoint was lost."""
    moments = random.Random(settings.seed)
    shared_before, descriptors_before = set(SHM.iterdir()), psutil.Process().num_fds()
    done, step, partial, repeated = 0, -1, 0, 0
    while done < settings.kills and step < settings.steps - settings.checkpoint_every:
        process = _start(out, settings, resume=step >= 0)
        if done % 4 and step >= 0:  # of the others, every fourth while it starts
            _wait_for_checkpoint_after(step, process, out)
        elif step < 0:
            _wait_for_checkpoint_after(-1, process, out)
        time.sleep(moments.uniform(0, settings.seconds))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        done += 1
        newest, warnings = checkpoint.newest(out / "checkpoints")
        if newest is None or warnings or checkpoint.step_of(newest) < step:
            raise DeviceError(f"after kill {done} the newest checkpoint is {newest}, after step {step}: {warnings}")
        partial += any((out / "checkpoints").glob("*.tmp*"))
        repeated += checkpoint.step_of(newest) == step
        step = checkpoint.step_of(newest)
    last = _start(out, settings, resume=True)
    last.join()
    _check_done(last, out)
    return {
        "kills": done,
        "kills_during_a_save": partial,
        "kills_before_a_new_checkpoint": repeated,
        "files_left": len(list((out / "checkpoints").iterdir())) - 4,  # two checkpoints and their hashes
        "shared_memory_left": len(set(SHM.iterdir()) - shared_before - _in_use()),
        "descriptors_left": max(0, psutil.Process().num_fds() - descriptors_before - 4),  # of the fork server
    }


def _in_use() -> set[Path]:
    """Shared memory that a process has mapped, such as that of other programs."""
    found: set[Path] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            lines = maps.read_text().splitlines()
            found |= {Path(line.split(None, 5)[5]) for line in lines if f" {SHM}/" in line}
    return found


def _wait_for_checkpoint_after(step: int, process: ForkServerProcess, out: Path) -> None:
    while process.is_alive():
        names = [path.name for path in (out / "checkpoints").glob("step-*.safetensors")]
        if any(int(name[5:-12]) > step for name in names):
            return
        time.sleep(0.005)


def _differences(alone: Path, killed: Path) -> list[str]:
    """Tensors of the last checkpoint, and steps of the metrics, that are not the same in both runs."""
    paths = [checkpoint.newest(out / "checkpoints")[0] for out in (alone, killed)]
    assert paths[0] is not None
    if paths[1] is None or paths[0].name != paths[1].name:
        return ["the last checkpoint"]
    ours, theirs = (load_file(path) for path in paths if path is not None)
    found = [name for name in sorted({*ours, *theirs}) if not _same(ours.get(name), theirs.get(name))]
    losses = [
        {record["step"]: record.get("loss") for record in read_metrics(out / "metrics.jsonl") if "loss" in record}
        for out in (alone, killed)
    ]
    return found + [f"the metrics of step {step}" for step in losses[0] if losses[0][step] != losses[1].get(step)]


def _same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours, theirs)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
