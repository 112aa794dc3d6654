"""A sweep: the same run for every combination of some settings, one after the other, and what came of each.

Every run has a folder of its own, so a sweep that was stopped goes on where it was: finished runs are read, a run that
was interrupted is resumed, the others are started. It keeps no other state.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmoco.config import FREE_ON_RESUME, RunConfig, differences
from fastmoco.config.checks import flag, known
from fastmoco.errors import CheckpointError, ConfigError, DivergedError, ExitCode
from fastmoco.files import write_atomically
from fastmoco.recipes import PUBLISHED
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.environment import git_commit, versions
from fastmoco.run.metrics import FILE_NAME as METRICS_NAME
from fastmoco.run.metrics import read_metrics


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes, as they are written on the command line."""

    field: str
    values: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Axis:
        """`moco-m=0,0.9,0.99`. Values of several numbers are joined by +: `head=100+50,512`. Raises ConfigError."""
        name, equals, values = text.partition("=")
        axis = Axis(name.lstrip("-").replace("-", "_"), tuple(value for value in values.split(",") if value))
        if not equals or not axis.values:
            raise ConfigError(f"--vary {text!r}: expected a setting and its values, such as moco-m=0,0.9,0.99")
        known(axis.field, RunConfig().flat(), "field")
        twice = sorted({value for value in axis.values if axis.values.count(value) > 1})
        if twice:
            raise ConfigError(f"--vary {text!r}: {twice[0]} is there twice")
        if axis.field in ("out", "resume", "overwrite"):
            raise ConfigError(f"--vary {text!r}: the sweep sets {flag(axis.field)} itself; expected another setting")
        return axis

    def flags(self, value: str) -> list[str]:
        """The arguments of `fastmoco train` for one value."""
        if isinstance(RunConfig().flat()[self.field], bool):
            if value not in ("true", "false"):
                raise ConfigError(f"--vary {self.field.replace('_', '-')}={value}: expected true or false")
            return [flag(self.field if value == "true" else f"no_{self.field}")]
        return [flag(self.field), *value.split("+")]


@dataclass
class Cell:
    """One combination: its values, what is asked of its run, and what came of it.

    outcome  "done", "diverged" or "not run"
    results  knn_before_percent, knn_percent, loss, images_per_s and more, as far as they were measured
    """

    values: dict[str, str]
    config: RunConfig
    outcome: str = "not run"
    results: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        assert self.config.run.out is not None
        return Path(self.config.run.out)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def learned_percent(self) -> float | None:
        """kNN accuracy at the end; None where it was not measured."""
        return self.results.get("knn_percent")


def plan(axes: Sequence[Axis], config_of: Callable[[list[str]], RunConfig], out: Path) -> list[Cell]:
    """The runs of a sweep, the last axis varying fastest. `config_of` turns arguments into a configuration.

    Raises ConfigError, before anything runs, for a combination that cannot be trained with.
    """
    cells: list[Cell] = []
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = {axis.field: value for axis, value in zip(axes, combination, strict=True)}
        flags = [word for axis in axes for word in axis.flags(values[axis.field])]
        name = _folder_name(values, {cell.name for cell in cells})
        cells.append(Cell(values, config_of([*flags, "--out", str(out / name)])))
    return cells


def _folder_name(values: dict[str, str], taken: set[str]) -> str:
    """`moco-m=0.9,moco-k=1024`, of letters that any folder may have, and none of those that are taken."""
    name = ",".join(f"{name.replace('_', '-')}={re.sub(r'[^A-Za-z0-9.+-]+', '-', v)}" for name, v in values.items())
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in numbered if candidate not in taken)


def run_sweep(
    cells: Sequence[Cell],
    train: Callable[[RunConfig], object],
    started: Callable[[Cell, str], None],
    *,
    redo: bool = False,
) -> None:
    """Brings every run to its end, and fills in what came of it.

    train    one run; its errors end the sweep, except that a run that diverges is a result
    started  told of each run that is about to be trained, and how: "run" or "resume"
    redo     train all of them again

    Raises ConfigError where a folder holds a run of other settings, and whatever `train` raises.
    """
    for cell in cells:
        if not redo and _is_over(cell):
            _read(cell)
            continue
        resumable = not redo and any((cell.folder / "checkpoints").glob("step-*.safetensors"))
        started(cell, "resume" if resumable else "run")
        exists = (cell.folder / "config.json").exists() or (cell.folder / "status.json").exists()
        try:
            train(cell.config.replace(resume=resumable, overwrite=exists and not resumable))
        except DivergedError:
            pass  # status.json says so
        except CheckpointError as error:
            raise CheckpointError(f"{error} (in a sweep: --overwrite trains all of it again)") from error
        _read(cell)


def _is_over(cell: Cell) -> bool:
    """Whether the run has ended, in success or divergence, with the settings that are asked for."""
    if not (cell.folder / "status.json").exists():
        return False
    if read_status(cell.folder)["exit_code"] not in (ExitCode.DONE, ExitCode.DIVERGED):
        return False
    ran = read_config(cell.folder)
    changed = [
        f"{name} is {asked!r} and was {found!r}"
        for name, asked, found in differences(cell.config, ran)
        if name not in FREE_ON_RESUME and _was_asked_for(name, asked)
    ]
    if changed:
        raise ConfigError(
            f"{cell.folder} holds a finished run of other settings ({'; '.join(changed)}): choose another --out, or "
            "train all of it again with --overwrite"
        )
    return True


def _was_asked_for(name: str, value: Any) -> bool:
    """Whether a setting was chosen by a person, and not left for the start of the run to fill in."""
    return value not in (None, "auto") and value != RunConfig().flat()[name]


def _read(cell: Cell) -> None:
    """Outcome and results from the files of a run."""
    code = read_status(cell.folder)["exit_code"]
    cell.outcome = {ExitCode.DONE: "done", ExitCode.DIVERGED: "diverged"}.get(code, "not run")
    records = read_metrics(cell.folder / METRICS_NAME)
    for name, recorded, trained in (
        ("knn_before_percent", "knn_top1_percent", False),
        ("knn_pixels_percent", "knn_pixels_top1_percent", False),
        ("knn_percent", "knn_top1_percent", True),
        ("effective_rank", "effective_rank", True),
        ("loss", "loss", True),
        ("images_per_s", "images_per_s", True),
    ):
        found = [r[recorded] for r in records if r.get(recorded) is not None and (r["step"] > 0) == trained]
        if found and math.isfinite(found[-1]):
            cell.results[name] = found[-1]


def paper_percent(cell: Cell) -> tuple[bool, float | None]:
    """(whether the paper tried this value, what it found: None where training failed), for a sweep of one setting."""
    if len(cell.values) != 1:
        return False, None
    ((name, value),) = cell.values.items()
    published = PUBLISHED.get(name)
    if published is None:
        return False, None
    found = {_same(text): percent for text, percent in published.percent.items()}
    return _same(value) in found, found.get(_same(value))


def _same(text: str) -> float | str:
    """A number whichever way it is written."""
    try:
        return float(text)
    except ValueError:
        return text


def write_json(path: Path, recipe: str, command: str, cells: Sequence[Cell]) -> None:
    """Every run with its settings and results, for other programs. Raises OSError."""
    runs = []
    for cell in cells:
        tried, paper = paper_percent(cell)
        record: dict[str, Any] = {"settings": cell.values, "folder": cell.name, "outcome": cell.outcome, **cell.results}
        runs.append(record | ({"paper_percent": paper} if tried else {}))
    about = {"recipe": recipe, "command": command, "git_commit": git_commit(), "versions": versions(), "runs": runs}
    write_atomically(path, json.dumps(about, indent=2) + "\n")
