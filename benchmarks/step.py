"""The training step alone, on synthetic views: an ablation ladder from the plain step to ours, one change a rung.

    uv run python benchmarks/step.py --suite gpu --out benchmarks/results     # both configurations, under 9 minutes
    uv run python benchmarks/step.py --suite cpu
    uv run python benchmarks/step.py --config r50 --rungs plain,compile --profile --out /tmp/profile

images/s are images, two views each. The rungs take turns; building, compiling and warming up are reported as such and
kept out of the rate. Achieved TFLOP/s are the FLOPs of the plain step's convolutions and matrix products, the same
ones on every rung, over the time; the roofline is a square matrix product in the 16-bit type, measured in this run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.harness import (
    Reading,
    environment,
    make_console,
    ratios,
    run_script,
    seconds_per_call,
    short,
    show,
    summarise,
    take_turns,
    write_json,
)
from benchmarks.measure.ladder import CONFIGS, LADDER, Runner, Variant, step_flops, time_limit
from benchmarks.measure.plain import Task
from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.errors import ConfigError

MATRIX_SIDES = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s of one training step without a loader, from the plain step to ours, one change at a time."""

    suite: Literal["cpu", "gpu"] | None = None
    """The ladders that suit a machine, in one go; --config and what overrides it are then not looked at. With --quick,
    the tiny task alone."""
    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px, or ResNet-50 at 224 px, as in the recipes."""
    arch: str | None = None
    """Another ResNet."""
    crop_size: int | None = None
    """Another side of the views in pixels."""
    batch_size: int | None = None
    """Another number of images a step."""
    queue: int | None = None
    """Another number of keys in the queue, a multiple of the batch."""
    bn_splits: int | None = None
    """Another number of groups that batch norm looks at; 1 is plain batch norm."""
    compile: Literal["default", "max-autotune"] = "default"
    """How the last rung is compiled."""
    rungs: str | None = None
    """Which rungs, separated by commas. Unset: all."""
    seconds: float = 1.0
    """How long each reading takes, in whole steps."""
    repetitions: int = 5
    """Rounds in which every rung has its turn."""
    profile: bool = False
    """Also write a Chrome trace of every rung, and print where its time goes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task and no compiling: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for JSON files and traces."""


@dataclass(frozen=True)
class Ladder:
    """One table: a task, and how long building, compiling and warming up its rungs may take in all."""

    name: str
    task: Task
    rungs: tuple[Variant, ...] = LADDER
    build_limit_s: float | None = None


def main(settings: Settings, console: Console | None = None) -> list[dict[str, Any]]:
    """Measures, prints a table for every ladder and returns what it writes. Raises ConfigError."""
    console = console or make_console()
    if settings.profile and settings.out is None:
        raise ConfigError("--profile writes traces: name a folder for them with --out")
    if settings.quick:
        settings = replace(settings, seconds=0.1, repetitions=2)
    device = pick_device(settings.device)
    torch.backends.cudnn.benchmark = True  # for every rung, as the authors' script does
    return [_climb(ladder, settings, device, console) for ladder in _ladders(settings)]


def _ladders(settings: Settings) -> list[Ladder]:
    cifar, r50 = CONFIGS["cifar"], CONFIGS["r50"]
    if settings.suite == "cpu" and not settings.quick:
        uncompiled = tuple(rung for rung in LADDER if rung.name != "compile")  # three minutes, for a hundredth
        return [Ladder("cifar-cpu", cifar, uncompiled)]
    if settings.suite == "gpu" and not settings.quick:  # with the readings, some 40 s a ladder, within nine minutes
        return [
            Ladder("cifar", cifar, build_limit_s=100),
            Ladder("r50", r50, build_limit_s=200),
            Ladder("cifar-plain-bn", replace(cifar, bn_splits=1), build_limit_s=60),
        ]
    task = CONFIGS[settings.config]
    if settings.quick:
        task = replace(task, arch="resnet18", side=16, batch_size=8, queue=64, bn_splits=2)
    given = {
        "arch": settings.arch,
        "side": settings.crop_size,
        "batch_size": settings.batch_size,
        "queue": settings.queue,
        "bn_splits": settings.bn_splits,
    }
    task = replace(task, **{name: value for name, value in given.items() if value is not None})
    if task.queue % task.batch_size:
        raise ConfigError(
            f"--queue {task.queue} is no multiple of --batch-size {task.batch_size}, as the plain step's is"
        )
    wanted = None if settings.rungs is None else {name.strip() for name in settings.rungs.split(",")}
    if wanted is None:
        wanted = {rung.name for rung in LADDER} - ({"compile"} if settings.quick else set())
    if unknown := wanted - {rung.name for rung in LADDER}:
        raise ConfigError(f"--rungs {min(unknown)} is unknown: expected some of {','.join(r.name for r in LADDER)}")
    return [Ladder(settings.config, task, tuple(rung for rung in LADDER if rung.name in wanted))]


def _climb(ladder: Ladder, settings: Settings, device: torch.device, console: Console) -> dict[str, Any]:
    task, amp = ladder.task, pick_amp("auto", device)
    dtype = DTYPES[amp] if amp != "fp32" else torch.bfloat16
    result: dict[str, Any] = {
        "benchmark": f"step-{ladder.name}",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None},
        "task": asdict(task),
        "dtype": str(dtype),
        "step_flops": step_flops(task),
    }
    climbers, left_out, began = {}, {}, time.monotonic()
    for rung in ladder.rungs:
        if rung.only_on not in (None, device.type):
            continue
        left_s = None if ladder.build_limit_s is None else ladder.build_limit_s - (time.monotonic() - began)
        try:
            with time_limit(left_s):
                climbers[rung.name] = Runner(rung, task, device, dtype, settings.compile, settings.seconds)
        except (RuntimeError, TimeoutError) as error:  # out of memory, no compiler, out of time: a rung, not the run
            left_out[rung.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if not climbers:
        raise ConfigError(f"no rung of {ladder.name} runs here: {'; '.join(left_out.values())}")
    result |= {"left_out": left_out, "rungs": _readings(climbers, result, settings, device)}
    _show(console, ladder, result)
    if settings.out is not None:
        write_json(settings.out / f"step-{ladder.name}.json", result)
        if settings.profile:
            for name, climber in climbers.items():
                _profile(f"{ladder.name}-{name}", climber, device, settings.out, console)
    return result


def _readings(
    climbers: dict[str, Runner], result: dict[str, Any], settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Of every rung what it took; the roofline has its turn among them, under the same conditions."""
    side = 256 if settings.quick else MATRIX_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, result["dtype"].split(".")[1])) for _ in range(2))
    product_s = seconds_per_call(lambda: a @ b, 1, device, warm_up=2)
    calls = max(1, round(min(0.3, settings.seconds) / product_s))

    def roofline() -> Reading:
        return {"tflop_per_s": 2 * side**3 / seconds_per_call(lambda: a @ b, calls, device) / 1e12}

    taken = take_turns({**climbers, "roofline": roofline}, settings.repetitions)
    result["roofline_tflop_per_s"] = summarise([reading["tflop_per_s"] for reading in taken.pop("roofline")])
    rates = {name: [reading["images_per_s"] for reading in readings] for name, readings in taken.items()}
    found: dict[str, Any] = {}
    for name, readings in taken.items():
        ms = summarise([reading["ms"] for reading in readings])
        achieved = result["step_flops"] / ms.median / 1e9
        found[name] = {
            "ms": ms,
            "images_per_s": summarise(rates[name]),
            "tflop_per_s": achieved,
            "share_of_roofline": achieved / result["roofline_tflop_per_s"].median,
            "ratio_to_plain": ratios(rates[name], rates["plain"]) if "plain" in rates else None,
            "warm_up_s": climbers[name].warm_up_s,
            "memory": climbers[name].memory,
        }
    return found


def _show(console: Console, ladder: Ladder, result: dict[str, Any]) -> None:
    labels = {rung.name: rung.change for rung in ladder.rungs}
    memories = {
        "peak_resident_bytes": "peak MB",
        "peak_allocated_bytes": "peak MB",
        "reserved_bytes": "reserved MB",
        "nvml_bytes": "NVML MB",
    }
    first = next(iter(result["rungs"].values()))
    present = [key for key in memories if key in first["memory"]]
    rows = []
    for name, found in result["rungs"].items():
        ratio = found["ratio_to_plain"]
        rows.append(
            (
                labels[name],
                str(found["images_per_s"]),
                "–" if ratio is None else f"{ratio.median:.2f}×",
                short(found["ms"].median),
                short(found["tflop_per_s"]),
                f"{found['share_of_roofline']:.1%}",
                *(short(found["memory"][key] / 1e6) for key in present),
                short(found["warm_up_s"]),
            )
        )
    columns = (
        "step",
        "images/s",
        "to plain",
        "ms",
        "TFLOP/s",
        "roofline",
        *(memories[k] for k in present),
        "warm-up s",
    )
    rows += [(labels[name], "not measured", *[""] * (len(columns) - 2)) for name in result["left_out"]]
    t = ladder.task
    note = f"roofline: {result['roofline_tflop_per_s']} TFLOP/s in {result['dtype']}; {result['step_flops']:.3g} FLOPs"
    note += "".join(f"\n{labels[name]}: {reason}" for name, reason in result["left_out"].items())
    sizes = f"{t.arch}, {t.side} px, batch {t.batch_size}, queue {t.queue:,}, {t.bn_splits} BN splits"
    show(console, f"step only, {sizes}", columns, rows, note)


def _profile(name: str, climber: Runner, device: torch.device, out: Path, console: Console) -> None:
    """A Chrome trace of three steps, and the ten kernels (on the CPU, operators) that take longest."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as prof:
        for _ in range(3):
            climber.step()
        if on_gpu:
            torch.cuda.synchronize(device)
    prof.export_chrome_trace(str(out / f"trace-{name}.json.gz"))

    def self_us(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = [
        event for event in prof.key_averages() if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(self_us(event) for event in events)
    longest = sorted(events, key=self_us, reverse=True)[:10]
    rows = [
        (event.key[:90], short(self_us(event) / 3e3), f"{self_us(event) / total:.1%}", short(event.count / 3))
        for event in longest
    ]
    columns = ("kernel" if on_gpu else "operator", "ms a step", "share", "calls a step")
    show(console, f"where the time of {name} goes", columns, rows)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
