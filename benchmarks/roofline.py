"""Where the training step stands under the machine's two ceilings: a matrix product and a copy, both measured here.

    uv run python benchmarks/roofline.py --results DIR --out DIR    # places what step.py and train.py wrote to DIR
    uv run python benchmarks/roofline.py --config r50               # measures the step itself
    uv run python benchmarks/roofline.py --quick

The least a step has to compute and to move is counted kernel by kernel from the model (benchmarks/measure/traffic.py
has the formulas and what they assume). A kernel takes at least the longer of its arithmetic and its memory traffic;
their sum is the least time of the step, and a measured rate stands at its share of that. Ceilings are sustained, not a
data sheet's: square products, and copies far larger than the caches, read and write counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks import step as step_script
from benchmarks.measure.harness import (
    Reading,
    Summary,
    environment,
    make_console,
    run_script,
    seconds_per_call,
    short,
    show,
    summarise,
    take_turns,
    write_json,
)
from benchmarks.measure.ladder import LADDER
from benchmarks.measure.plain import Task
from benchmarks.measure.traffic import Ceilings, Group, count_step, group_of, groups_of
from benchmarks.reporting.collected import read
from benchmarks.reporting.headlines import PLAIN
from benchmarks.reporting.plots import roofline_picture
from benchmarks.step import MATRIX_SIDES
from fastmoco.device import DTYPES, pick_device
from fastmoco.errors import ConfigError

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
COPY = "copy"
_SHORT = {str(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The two ceilings of this machine, what bounds each part of the training step, and how near the step is."""

    results: Path | None = None
    """A folder in which step.py and train.py left results. Unset: the step is measured here."""
    config: Literal["cifar", "r50"] = "cifar"
    """Without results: ResNet-18 at 32 px, or ResNet-50 at 224 px."""
    batch_size: int | None = None
    """Without results: another number of images a step."""
    seconds: float = 0.5
    """How long each reading of a ceiling takes."""
    repetitions: int = 5
    """Rounds in which every ceiling has its turn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """Small products, small copies, a tiny step: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for the JSON file and the picture."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table for every task and returns what it writes. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.05, repetitions=2)
    device = pick_device(settings.device)
    measured = _measured(settings, device)
    ceilings = measure_ceilings(device, settings)
    result = {
        "benchmark": "roofline",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None, "results": None},
        "ceilings": ceilings,
        "steps": [_place(one, ceilings) for one in measured],
    }
    _show_ceilings(console, ceilings)
    for placed in result["steps"]:
        _show_step(console, placed)
    if settings.out is not None:
        write_json(settings.out / "roofline.json", result)
        for placed in result["steps"]:
            picture = roofline_picture(placed, {name: ceiling.median for name, ceiling in ceilings.items()})
            (settings.out / f"roofline-{placed['name']}.svg").write_text(picture, encoding="utf-8")
    return result


@dataclass(frozen=True)
class Measured:
    """A task, and what was measured of it: name, number format and images/s. `main_format` is that of our step."""

    name: str
    task: Task
    main_format: str
    rates: list[tuple[str, str, float]]


def _measured(settings: Settings, device: torch.device) -> list[Measured]:
    """What step.py and train.py have written, or what step.py measures now."""
    if settings.results is not None:
        found = read(settings.results)
        measured = [_of_step(result, device) for result in found.of("step").values()]
        # the count is of an encoder of full width
        trained = [result for result in found.of("train").values() if result["task"].get("width", 1) == 1]
        measured += [_of_training(result, device) for result in trained]
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
        return [_of_step(result, device) for result in read(Path(scratch)).of("step").values()]


def _of_step(result: dict[str, Any], device: torch.device) -> Measured:
    """The rungs of a ladder."""
    low, known = _SHORT[result["dtype"]], {rung.name: rung for rung in LADDER}
    rates = []
    for name, one in result["rungs"].items():
        rung = known.get(name)
        if rung is None:  # of an older ladder
            continue
        form = low if rung.dtype is None else _SHORT[str(rung.dtype)]
        rates.append((name, form if rung.low_precision else _float32(device), one["images_per_s"]["median"]))
    return Measured(result["benchmark"], Task(**result["task"]), low, rates)


def _of_training(result: dict[str, Any], device: torch.device) -> Measured:
    """Every pipeline end to end, and the step alone."""
    amp = result["step"]["amp"]
    names = {"ours": "step alone", PLAIN: "plain step alone"}
    cases = {names[key]: (key, one) for key, one in result["step_only"].items()}
    cases |= {f"{name}, from files": (name, one) for name, one in result["cases"].items()}
    rates = []
    for name, (key, one) in cases.items():
        form = amp if key != PLAIN and amp != "fp32" else _float32(device)
        rates.append((name, form, one["images_per_s"]["median"]))
    task = {key: value for key, value in result["task"].items() if key != "width"}
    return Measured(result["benchmark"], Task(**task), amp, rates)


def _float32(device: torch.device) -> str:
    """cuDNN multiplies float32 in TF32 unless it is told otherwise, and nobody tells it."""
    return "tf32" if device.type == "cuda" else "fp32"


def measure_ceilings(device: torch.device, settings: Settings) -> dict[str, Summary]:
    """FLOP/s of square matrix products by number format, and under `copy` bytes/s of a copy, read and write."""
    cases: dict[str, Callable[[], Reading]] = {}
    side = 256 if settings.quick else MATRIX_SIDES[device.type]
    formats = ("fp32", "tf32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    for name in formats:
        a, b = (torch.randn(side, side, device=device).to(DTYPES.get(name, torch.float32)) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b, name: str = name) -> Reading:
            with _precision("high" if name == "tf32" else "highest"):
                return {"per_s": 2 * side**3 / _seconds(lambda: a @ b, device, settings.seconds)}

        cases[name] = product
    size = 2**22 if settings.quick else COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    cases[COPY] = lambda: {"per_s": 2 * size / _seconds(lambda: target.copy_(source), device, settings.seconds)}
    readings = take_turns(cases, settings.repetitions)
    return {name: summarise([reading["per_s"] for reading in taken]) for name, taken in readings.items()}


def _seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    once_s = seconds_per_call(call, 1, device)
    return seconds_per_call(call, max(1, round(seconds / once_s)), device, warm_up=0)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """How CUDA multiplies float32 inside: `highest` exactly, `high` in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _place(measured: Measured, found: dict[str, Summary]) -> dict[str, Any]:
    """A task under the ceilings: its groups for each number format in use, and every rate that was measured of it."""
    task, formats, points = measured.task, {}, []
    for name in dict.fromkeys(form for _, form, _ in measured.rates):
        ceilings = Ceilings(found[name].median, found[COPY].median)
        kernels = count_step(task, 4 if name in ("fp32", "tf32") else 2)
        whole = group_of(kernels, ceilings)
        described = {group: _described(part) for group, part in groups_of(kernels, ceilings).items()}
        formats[name] = _described(whole) | {"images_per_s": task.batch_size / whole.seconds, "groups": described}
    for name, form, rate in measured.rates:
        at = formats[form]
        points.append(
            {
                "name": name,
                "format": form,
                "images_per_s": rate,
                "flop_per_s": at["flops"] * rate / task.batch_size,
                "intensity": at["intensity"],
                "share_of_roof": rate / at["images_per_s"],
            }
        )
    main_format = measured.main_format if measured.main_format in formats else next(iter(formats))
    placed = {"name": measured.name, "task": asdict(task), "main_format": main_format}
    return placed | {"formats": formats, "points": points}


def _described(group: Group) -> dict[str, Any]:
    return asdict(group) | {"intensity": group.intensity, "bound": group.bound}


def _show_ceilings(console: Console, ceilings: dict[str, Summary]) -> None:
    rows = [
        (
            name,
            *((short(value / (1e9 if name == COPY else 1e12))) for value in (c.median, min(c.values), max(c.values))),
        )
        for name, c in ceilings.items()
    ]
    rows = [(f"{name}, {'GB/s' if name == COPY else 'TFLOP/s'}", *numbers) for name, *numbers in rows]
    show(console, "ceilings", ("", "median", "lowest", "highest"), rows)


def _show_step(console: Console, placed: dict[str, Any]) -> None:
    t = placed["task"]
    form = placed["main_format"]
    whole = placed["formats"][form]
    rows = [
        (
            name,
            short(group["flops"] / 1e9),
            short(group["bytes"] / 1e6),
            short(group["intensity"]),
            short(1e3 * group["seconds"]),
            f"{group['seconds'] / whole['seconds']:.1%}",
            group["bound"],
        )
        for name, group in [*whole["groups"].items(), ("whole step", whole)]
    ]
    columns = ("kernels", "GFLOP", "MB", "FLOP/byte", "at least ms", "share", "bound by")
    note = f"least time {1e3 * whole['seconds']:.3g} ms, {short(whole['images_per_s'])} images/s at most"
    show(console, f"{t['arch']}, {t['side']} px, batch {t['batch_size']}, in {form}", columns, rows, note)
    rows = [
        (p["name"], p["format"], short(p["images_per_s"]), short(p["flop_per_s"] / 1e12), f"{p['share_of_roof']:.1%}")
        for p in placed["points"]
    ]
    show(console, "measured", ("what", "format", "images/s", "TFLOP/s", "of the roofline"), rows)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
