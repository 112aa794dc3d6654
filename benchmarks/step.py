"""The training step alone, on synthetic views: an ablation from the plain step to ours, one change per variant.

    uv run python benchmarks/step.py --suite gpu --out DIR     # both configurations, under 9 minutes
    uv run python benchmarks/step.py --suite cpu               # a few minutes on two cores
    uv run python benchmarks/step.py --config r50 --rungs plain,compile --profile --out /tmp/profile

images/s are images, two views each. Variants are interleaved; the time to build, compile and warm up is reported
separately. TFLOP/s are the FLOPs of the plain step's convolutions and matrix products, for every variant, over the
time; the roofline of a variant is a square matrix product in its own number format, measured in the same run.

On a CPU, `kept-memory` is the step of `fastmoco train`. A processor without bf16 instructions trains in fp32: `amp` is
left out there, and `winograd` elsewhere, which does fewer multiplications than are counted. The suite's batch is the
recipe's 512 in bf16 and 128 in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.ceilings import MATRIX_SIDES, format_of, matrix_product
from benchmarks.measure.harness import (
    Reading,
    environment,
    parse_names,
    ratios,
    run_script,
    seconds_per_call,
    short,
    summarise,
    values_of,
)
from benchmarks.measure.plain import Task
from benchmarks.measure.turns import attempt, describe, interleave, save
from benchmarks.measure.variants import CONFIGS, VARIANTS, Runner, Variant, shrunk, step_flops, time_limit
from benchmarks.reporting.page import Heading, Table, make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.errors import ConfigError

FP32_CPU_BATCH = 128  # instead of the recipe's 512, whose steps take too long in fp32 for five rounds in minutes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s of the training step without a loader, from the plain step to ours, one change at a time."""

    suite: Literal["cpu", "gpu"] | None = None
    """The ablations for a kind of machine, in place of --config and its overrides. With --quick, only the tiny task."""
    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px, or ResNet-50 at 224 px, as in the recipes."""
    arch: str | None = None
    """Another ResNet than the configuration's."""
    crop_size: int | None = None
    """Another side of the views, in pixels."""
    batch_size: int | None = None
    """Another number of images per step."""
    queue: int | None = None
    """Another number of keys in the queue: a multiple of the batch."""
    bn_splits: int | None = None
    """Another number of batch norm groups; 1 is plain batch norm."""
    compile: Literal["default", "max-autotune"] = "default"
    """Mode of torch.compile for the compiled variants."""
    rungs: str | None = None
    """Names of variants, separated by commas. Unset: all."""
    seconds: float = 1.0
    """Duration of a reading, in whole steps."""
    repetitions: int = 5
    """Number of interleaved rounds."""
    profile: bool = False
    """Also write a Chrome trace of every variant, and print its slowest kernels."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task without compilation, to check that everything works."""
    out: Path | None = None
    """Folder for JSON files and traces."""


@dataclass(frozen=True)
class Ablation:
    """A task and its variants. `build_limit_s` limits the total time to build, compile and warm up all of them."""

    name: str
    task: Task
    variants: tuple[Variant, ...] = VARIANTS
    build_limit_s: float | None = None


def main(settings: Settings, console: Console | None = None) -> list[dict[str, Any]]:
    """Measure, print a table per ablation, write the results and return them. Raises ConfigError.

    An ablation of which no variant runs here has no rungs, and its reasons.
    """
    console = console or make_console()
    if settings.profile and settings.out is None:
        raise ConfigError("--profile writes traces: name a folder for them with --out")
    if settings.quick:
        settings = replace(settings, seconds=0.1, repetitions=2)
    device = pick_device(settings.device)
    torch.backends.cudnn.benchmark = True  # for all variants, as in the authors' script
    results = [_run(ablation, settings, device, console) for ablation in _ablations(settings)]
    if not any(result["rungs"] for result in results):
        raise ConfigError(f"no variant runs here: {'; '.join(describe(result['left_out']) for result in results)}")
    return results


def _ablations(settings: Settings) -> list[Ablation]:
    cifar, r50 = CONFIGS["cifar"], CONFIGS["r50"]
    if settings.suite == "cpu" and not settings.quick:
        uncompiled = tuple(v for v in VARIANTS if v.name != "compile")  # three minutes, for a gain of 1 %
        if pick_amp("auto", pick_device(settings.device)) == "fp32":
            cifar = replace(cifar, batch_size=FP32_CPU_BATCH)
        return [Ablation("cifar-cpu", cifar, uncompiled)]
    if settings.suite == "gpu" and not settings.quick:  # within nine minutes, with 40 s of readings per ablation
        return [
            Ablation("cifar", cifar, build_limit_s=100),
            Ablation("r50", r50, build_limit_s=200),
            Ablation("cifar-plain-bn", replace(cifar, bn_splits=1), build_limit_s=60),
        ]
    task = CONFIGS[settings.config]
    if settings.quick:
        task = shrunk(task)
    overrides = {
        "arch": settings.arch,
        "side": settings.crop_size,
        "batch_size": settings.batch_size,
        "queue": settings.queue,
        "bn_splits": settings.bn_splits,
    }
    task = replace(task, **{name: value for name, value in overrides.items() if value is not None})
    if task.queue % task.batch_size:
        raise ConfigError(
            f"--queue {task.queue} is no multiple of --batch-size {task.batch_size}, which the plain step requires"
        )
    known = [variant.name for variant in VARIANTS if not (settings.quick and variant.name == "compile")]
    wanted = known if settings.rungs is None else parse_names(settings.rungs, [v.name for v in VARIANTS], "--rungs")
    return [Ablation(settings.config, task, tuple(variant for variant in VARIANTS if variant.name in wanted))]


def _run(ablation: Ablation, settings: Settings, device: torch.device, console: Console) -> dict[str, Any]:
    task, dtype = ablation.task, DTYPES[pick_amp("auto", device)]
    result: dict[str, Any] = {
        "benchmark": f"step-{ablation.name}",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None},
        "task": asdict(task),
        "dtype": str(dtype),
        "step_flops": step_flops(task),
    }
    path = None if settings.out is None else settings.out / f"step-{ablation.name}.json"
    result |= {"left_out": {}, "rungs": {}}
    runners = _build(ablation, settings, device, dtype, result["left_out"])
    if runners:
        with suppress(ConfigError):  # every variant failed in a reading, and `left_out` has the reasons
            _measure(runners, result, settings, device, path)
    save(path, result, result.get("rounds", settings.repetitions), settings.repetitions)
    print_blocks(console, section(result))
    if settings.profile and settings.out is not None:
        for name in result["rungs"]:
            _profile(f"{ablation.name}-{name}", runners[name], device, settings.out, console)
    return result


def _build(
    ablation: Ablation, settings: Settings, device: torch.device, dtype: torch.dtype, left_out: dict[str, str]
) -> dict[str, Runner]:
    """The variants that run here, within the time limit; the reasons why others do not go into `left_out`."""
    runners, began = {}, time.monotonic()
    for variant in ablation.variants:
        if not variant.exists(ablation.task, device):
            continue
        if (why := variant.missing(device, dtype)) is not None:
            left_out[variant.name] = why
            continue
        left_s = None if ablation.build_limit_s is None else ablation.build_limit_s - (time.monotonic() - began)

        def build(variant: Variant = variant, left_s: float | None = left_s) -> Runner:
            with time_limit(left_s):
                return Runner(variant, ablation.task, device, dtype, settings.compile, settings.seconds)

        if (runner := attempt(build, variant.name, left_out)) is not None:
            runners[variant.name] = runner
    return runners


def _measure(
    runners: dict[str, Runner], result: dict[str, Any], settings: Settings, device: torch.device, path: Path | None
) -> None:
    """Fill in `rungs` and write the result after every round.

    The rooflines are measured between the variants, under the same conditions.
    """
    rooflines: dict[str, Callable[[], Reading]] = {}
    for number_format in dict.fromkeys(format_of(runner.dtype, device) for runner in runners.values()):
        name = f"{number_format} product"
        case = attempt(lambda f=number_format: _roofline(settings, device, f), name, result["left_out"])
        if case is not None:
            rooflines[name] = case

    def write(readings: dict[str, list[Reading]], rounds: int) -> None:
        result["rungs"] = _rungs(readings, runners, result, device)
        save(path, result, rounds, settings.repetitions)

    cases: dict[str, Callable[[], Reading]] = {**runners, **rooflines}
    interleave(cases, settings.repetitions, left_out=result["left_out"], after_round=write)


def _roofline(settings: Settings, device: torch.device, number_format: str) -> Callable[[], Reading]:
    """A case: a square matrix product."""
    side = 256 if settings.quick else MATRIX_SIDES[device.type]
    product = matrix_product(number_format, device, side)
    product_s = seconds_per_call(product, 1, device, warm_up=2)
    calls = max(1, round(min(0.3, settings.seconds) / product_s))
    return lambda: {"tflop_per_s": 2 * side**3 / seconds_per_call(product, calls, device) / 1e12}


def _rungs(
    readings: dict[str, list[Reading]], runners: dict[str, Runner], result: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Readings of every variant by name; the rooflines go into the result itself, by number format."""
    peaks = {name.split()[0]: of_case for name, of_case in readings.items() if name not in runners}
    result["peaks_tflop_per_s"] = {name: summarise(values_of(peak, "tflop_per_s")) for name, peak in peaks.items()}
    rates = {name: values_of(of_case, "images_per_s") for name, of_case in readings.items() if name in runners}
    described: dict[str, Any] = {}
    for name, of_case in rates.items():
        ms = summarise(values_of(readings[name], "ms"))
        achieved = result["step_flops"] / ms.median / 1e9
        number_format = format_of(runners[name].dtype, device)
        peak = result["peaks_tflop_per_s"].get(number_format)
        described[name] = {
            "format": number_format,
            "ms": ms,
            "images_per_s": summarise(of_case),
            "tflop_per_s": achieved,
            "share_of_roofline": None if peak is None else achieved / peak.median,
            "ratio_to_plain": ratios(of_case, rates["plain"]) if "plain" in rates else None,
            "warm_up_s": runners[name].warm_up_s,
            "memory": runners[name].memory,
        }
    return described


def _profile(name: str, runner: Runner, device: torch.device, out: Path, console: Console) -> None:
    """Write a Chrome trace of three steps, and print the ten slowest kernels (on a CPU, operators)."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as prof:
        for _ in range(3):
            runner.step()
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
    columns = ("kernel" if on_gpu else "operator", "ms/step", "share", "calls/step")
    print_blocks(console, [Heading(f"slowest {columns[0]}s of {name}"), Table(columns, rows)])


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
