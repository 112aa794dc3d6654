"""Roofline of the training step: measured rates against a matrix product and a copy on the same machine.

    uv run python benchmarks/roofline.py --results DIR --out DIR    # uses the results of step.py and train.py in DIR
    uv run python benchmarks/roofline.py --config r50               # measures the step itself
    uv run python benchmarks/roofline.py --quick

Lower bounds on FLOPs and memory traffic are counted kernel by kernel from the model (formulas and assumptions in
benchmarks/measure/traffic.py). The minimum time of a kernel is that of its arithmetic or of its memory traffic,
whichever is longer; their sum is the minimum time of the step, and a measured rate is reported as a share of the rate
at that time. Ceilings are sustained rates, not a data sheet's: square products, and copies far larger than the caches,
with read and write counted.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks import step as step_script
from benchmarks.measure.ceilings import MATRIX_SIDES, format_of, formats_on, matrix_product
from benchmarks.measure.harness import (
    Reading,
    Summary,
    environment,
    run_script,
    seconds_per_call,
    summarise,
    values_of,
)
from benchmarks.measure.plain import Task
from benchmarks.measure.traffic import Ceilings, Group, count_step, group_of, groups_of
from benchmarks.measure.turns import attempt, describe, interleave, save
from benchmarks.reporting.collected import read
from benchmarks.reporting.headlines import PLAIN
from benchmarks.reporting.page import make_console, pictures, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.device import DTYPES, pick_device
from fastmoco.errors import ConfigError

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
COPY = "copy"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The two ceilings of this machine, the bound of each layer group, and how close the training step is to them."""

    results: Path | None = None
    """A folder with results of step.py and train.py. Unset: measure the step."""
    config: Literal["cifar", "r50"] = "cifar"
    """Without results: ResNet-18 at 32 px, or ResNet-50 at 224 px."""
    batch_size: int | None = None
    """Without results: another number of images per step."""
    seconds: float = 0.5
    """Duration of a reading of a ceiling."""
    repetitions: int = 5
    """Number of interleaved rounds."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """Small products, small copies and a tiny step, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file and the pictures."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table per task, write the result and return it. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.05, repetitions=2)
    device = pick_device(settings.device)
    measured = _measured(settings, device)
    path = None if settings.out is None else settings.out / "roofline.json"
    result: dict[str, Any] = {
        "benchmark": "roofline",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None, "results": None},
        "left_out": {},
    }

    def write(ceilings: dict[str, Summary], rounds: int) -> None:
        steps = [_place(task, ceilings) for task in measured if COPY in ceilings]
        result.update(ceilings=ceilings, steps=[step for step in steps if step is not None])
        save(path, result, rounds, settings.repetitions)

    measure_ceilings(device, settings, result["left_out"], write)
    if not result["steps"]:
        raise ConfigError(f"no ceiling could be measured for a step: {describe(result['left_out'])}")
    blocks = section(result)
    print_blocks(console, blocks)
    if settings.out is not None:
        for picture in pictures(blocks):
            (settings.out / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    return result


@dataclass(frozen=True)
class Measured:
    """A task and its measured rates: name, number format and images/s. `main_format` is that of our step."""

    name: str
    task: Task
    main_format: str
    rates: list[tuple[str, str, float]]


def _measured(settings: Settings, device: torch.device) -> list[Measured]:
    """The results of step.py and train.py, or a new measurement with step.py."""
    if settings.results is not None:
        collection = read(settings.results)
        measured = [_from_step(result, device) for result in collection.of("step").values()]
        # FLOPs and traffic are counted for the full width
        full_width = [result for result in collection.of("train").values() if result["task"].get("width", 1) == 1]
        measured += [_from_training(result, device) for result in full_width]
        measured = [task for task in measured if task.rates]
        if not measured:
            raise ConfigError(
                f"{settings.results} has no result of step.py or train.py: run one with --out there first"
            )
        return measured
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        step = step_script.Settings(
            config=settings.config,
            batch_size=settings.batch_size,
            rungs="plain,trainstep",
            device=settings.device,
            quick=settings.quick,
            repetitions=3,
            out=Path(scratch),
        )
        step_script.main(step, Console(file=io.StringIO()))
        return [_from_step(result, device) for result in read(Path(scratch)).of("step").values()]


def _from_step(result: dict[str, Any], device: torch.device) -> Measured:
    """The variants of an ablation, unless they are of an earlier version, which noted no formats."""
    rates = [
        (name, readings["format"], readings["images_per_s"]["median"])
        for name, readings in result["rungs"].items()
        if "format" in readings
    ]
    dtype = getattr(torch, result["dtype"].removeprefix("torch."))
    return Measured(result["benchmark"], Task(**result["task"]), format_of(dtype, device), rates)


def _from_training(result: dict[str, Any], device: torch.device) -> Measured:
    """All pipelines end to end, and the step alone."""
    dtype = DTYPES[result["step"]["amp"]]
    names = {"ours": "step alone", PLAIN: "plain step alone"}
    cases = {names[key]: (key, readings) for key, readings in result["step_only"].items()}
    cases |= {f"{name}, from files": (name, readings) for name, readings in result["cases"].items()}
    rates = []
    for name, (key, readings) in cases.items():
        number_format = format_of(torch.float32 if key == PLAIN else dtype, device)
        rates.append((name, number_format, readings["images_per_s"]["median"]))
    task = {key: value for key, value in result["task"].items() if key != "width"}
    return Measured(result["benchmark"], Task(**task), format_of(dtype, device), rates)


def measure_ceilings(
    device: torch.device,
    settings: Settings,
    left_out: dict[str, str],
    after_round: Callable[[dict[str, Summary], int], None] = lambda ceilings, rounds: None,
) -> dict[str, Summary]:
    """FLOP/s of square matrix products by number format, and under `copy` bytes/s of a copy, read plus write.

    The reasons of those that fail go into `left_out`; `after_round` gets the ceilings so far. Raises ConfigError if
    none is left.
    """
    cases: dict[str, Callable[[], Reading]] = {}
    for name in formats_on(device):
        case = attempt(lambda name=name: _product(name, device, settings), name, left_out)
        if case is not None:
            cases[name] = case
    case = attempt(lambda: _copy(device, settings), COPY, left_out)
    if case is not None:
        cases[COPY] = case

    def write(readings: dict[str, list[Reading]], rounds: int) -> None:
        after_round(_ceilings(readings), rounds)

    return _ceilings(interleave(cases, settings.repetitions, left_out=left_out, after_round=write))


def _ceilings(readings: dict[str, list[Reading]]) -> dict[str, Summary]:
    return {name: summarise(values_of(of_case, "per_s")) for name, of_case in readings.items()}


def _product(name: str, device: torch.device, settings: Settings) -> Callable[[], Reading]:
    """A case: a product in a number format."""
    side = 256 if settings.quick else MATRIX_SIDES[device.type]
    product = matrix_product(name, device, side)
    return lambda: {"per_s": 2 * side**3 / _seconds(product, device, settings.seconds)}


def _copy(device: torch.device, settings: Settings) -> Callable[[], Reading]:
    """A case: a copy on the device."""
    size = 2**22 if settings.quick else COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: {"per_s": 2 * size / _seconds(lambda: target.copy_(source), device, settings.seconds)}


def _seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    once_s = seconds_per_call(call, 1, device)
    return seconds_per_call(call, max(1, round(seconds / once_s)), device, warm_up=0)


def _place(measured: Measured, summaries: dict[str, Summary]) -> dict[str, Any] | None:
    """A task under the ceilings: its layer groups for each number format in use, and its measured rates.

    None if there is no ceiling for any of its number formats.
    """
    task, formats, points = measured.task, {}, []
    rates = [rate for rate in measured.rates if rate[1] in summaries]
    if not rates:
        return None
    for name in dict.fromkeys(number_format for _, number_format, _ in rates):
        ceilings = Ceilings(summaries[name].median, summaries[COPY].median)
        kernels = count_step(task, 4 if name in ("fp32", "tf32") else 2)
        whole = group_of(kernels, ceilings)
        described = {name: _described(group) for name, group in groups_of(kernels, ceilings).items()}
        formats[name] = _described(whole) | {"images_per_s": task.batch_size / whole.seconds, "groups": described}
    for name, number_format, rate in rates:
        bound = formats[number_format]
        points.append(
            {
                "name": name,
                "format": number_format,
                "images_per_s": rate,
                "flop_per_s": bound["flops"] * rate / task.batch_size,
                "intensity": bound["intensity"],
                "share_of_roof": rate / bound["images_per_s"],
            }
        )
    main_format = measured.main_format if measured.main_format in formats else next(iter(formats))
    step = {"name": measured.name, "task": asdict(task), "main_format": main_format}
    return step | {"formats": formats, "points": points}


def _described(group: Group) -> dict[str, Any]:
    return asdict(group) | {"intensity": group.intensity, "bound": group.bound}


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
