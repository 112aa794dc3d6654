"""Where the training step stands under the machine's two ceilings: a matrix product and a copy, both measured here.

    uv run python benchmarks/roofline.py --results DIR --out DIR    # places what step.py and train.py wrote to DIR
    uv run python benchmarks/roofline.py --config r50               # measures the step itself
    uv run python benchmarks/roofline.py --quick

The least a step has to compute and to move is counted kernel by kernel from the model (benchmarks/traffic.py has the
formulas and what they assume). A kernel takes at least the longer of its arithmetic and its memory traffic; their sum
is the least time of the step, and a measured rate stands at its share of that. Ceilings are sustained, not a data
sheet's: square products, and copies far larger than the caches, read and write counted.
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
from benchmarks.collected import read
from benchmarks.harness import (
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
from benchmarks.ladder import LADDER
from benchmarks.plain import Task
from benchmarks.plots import roofline_picture
from benchmarks.step import MATRIX_SIDES
from benchmarks.traffic import Ceilings, count_step, group_of, groups_of
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
    steps, trained = _measured(settings)
    ceilings = measure_ceilings(device, settings)
    result = {
        "benchmark": "roofline",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None, "results": None},
        "ceilings": ceilings,
        "steps": [_place(found, trained, ceilings, device) for found in steps],
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


def _measured(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What step.py and train.py have written, or what step.py measures now."""
    if settings.results is None:
        with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
            task = step_script.Settings(
                config=settings.config,
                batch_size=settings.batch_size,
                rungs="plain,trainstep",
                device=settings.device,
                quick=settings.quick,
                repetitions=3,
                out=Path(scratch),
            )
            step_script.main(task, Console(file=io.StringIO()))
            return list(read(Path(scratch)).of("step").values()), []
    found = read(settings.results)
    if not (steps := list(found.of("step").values())):
        raise ConfigError(f"{settings.results} has no result of step.py: run benchmarks/step.py --out there first")
    return steps, list(found.of("train").values())


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


def _place(
    found: dict[str, Any], trained: list[dict[str, Any]], measured: dict[str, Summary], device: torch.device
) -> dict[str, Any]:
    """A task under the ceilings: its groups for each number format in use, and every rate that was measured of it."""
    task, low = Task(**found["task"]), _SHORT[found["dtype"]]
    rates = [(n, _format(n, low, device), rung["images_per_s"]["median"]) for n, rung in found["rungs"].items()]
    rates += _end_to_end(trained, task, _format("plain", low, device))
    formats, points = {}, []
    for name in dict.fromkeys(form for _, form, _ in rates):
        ceilings = Ceilings(measured[name].median, measured[COPY].median)
        kernels = count_step(task, 4 if name in ("fp32", "tf32") else 2)
        whole = group_of(kernels, ceilings)
        described = {group: _described(part) for group, part in groups_of(kernels, ceilings).items()}
        formats[name] = _described(whole) | {"images_per_s": task.batch_size / whole.seconds, "groups": described}
    for name, form, rate in rates:
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
    return {
        "name": found["benchmark"].removeprefix("step-"),
        "task": asdict(task),
        "main_format": low if low in formats else next(iter(formats)),
        "formats": formats,
        "points": points,
    }


def _described(group: Any) -> dict[str, Any]:
    return asdict(group) | {"intensity": group.intensity, "bound": group.bound}


def _format(rung: str, low: str, device: torch.device) -> str:
    """The number format of a rung's convolutions: cuDNN multiplies float32 in TF32 unless told otherwise."""
    known = {known.name: known for known in LADDER}[rung]
    if not known.low_precision:
        return "tf32" if device.type == "cuda" else "fp32"
    return low if known.dtype is None else _SHORT[str(known.dtype)]


def _end_to_end(trained: list[dict[str, Any]], task: Task, plain: str) -> Iterator[tuple[str, str, float]]:
    """Name, number format and rate of what train.py measured of the same work."""
    same = ("arch", "side", "batch_size", "bn_splits")
    for result in trained:
        measured = result["task"]
        if measured.get("width", 1) == 1 and all(measured.get(key) == getattr(task, key) for key in same):
            for name, case in result["cases"].items():
                form = plain if name == "plain" else result["step"]["amp"]
                yield f"{name}, end to end", form, case["images_per_s"]["median"]


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
