"""Sweeps: one run for every combination of settings, trained one after the other, and their results.

Each run has its own folder, and a sweep has no other state. A stopped sweep continues: results of finished runs are
read, an interrupted run is resumed, the others are started.
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
from fastmoco.config.flags import flags_of
from fastmoco.config.peers import own_name
from fastmoco.config.resume import ADAPTED_TO_IMAGES, absolute_data
from fastmoco.errors import CheckpointError, ConfigError, DivergedError, ExitCode
from fastmoco.recipes import PUBLISHED, recipe
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.environment import git_commit, versions
from fastmoco.run.metrics import FILE_NAME as METRICS_NAME
from fastmoco.run.metrics import read_metrics
from pipelines.files import write_atomically


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as written on the command line."""

    field: str
    values: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Axis:
        """Parse `moco-m=0,0.9,0.99`; + joins the numbers of one value: `head=100+50,512`. Raises ConfigError."""
        name, equals, values = text.partition("=")
        own = own_name(flag(name.lstrip("-")), flags_of(RunConfig), "sweep")
        axis = Axis(own.lstrip("-").replace("-", "_"), tuple(value for value in values.split(",") if value))
        if not name or not equals or not axis.values:
            raise ConfigError(f"--vary {text!r}: expected a setting and its values, such as moco-m=0,0.9,0.99")
        known(axis.field, RunConfig().flat(), "field")
        repeated = sorted({value for value in axis.values if axis.values.count(value) > 1})
        if repeated:
            raise ConfigError(f"--vary {text!r}: {repeated[0]} is repeated")
        if axis.field in ("out", "resume", "resume_from", "overwrite"):
            raise ConfigError(f"--vary {text!r}: the sweep itself sets {flag(axis.field)}; expected another setting")
        return axis

    def flags(self, value: str) -> list[str]:
        """Arguments of `fastmoco train` for one value. Raises ConfigError if a switch is not true or false."""
        if isinstance(RunConfig().flat()[self.field], bool):
            if value not in ("true", "false"):
                raise ConfigError(f"--vary {self.field.replace('_', '-')}={value}: expected true or false")
            return [flag(self.field if value == "true" else f"no_{self.field}")]
        return [flag(self.field), *value.split("+")]


@dataclass
class Cell:
    """One combination of a sweep: values by setting, configuration of the run, outcome and results.

    from_recipe  fields that only the recipe sets
    outcome      "done", "diverged" or "not run"
    results      knn_before_percent, knn_percent, loss, images_per_s and others, if measured
    """

    values: dict[str, str]
    config: RunConfig
    from_recipe: frozenset[str] = frozenset()
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
    def knn_percent(self) -> float | None:
        """kNN accuracy at the end; None if not measured."""
        return self.results.get("knn_percent")


def plan(axes: Sequence[Axis], parse: Callable[[list[str]], tuple[RunConfig, frozenset[str]]], out: Path) -> list[Cell]:
    """The runs of a sweep, the last axis varying fastest.

    parse  reads arguments of `fastmoco train`: the configuration, and the fields that only the recipe sets

    Raises ConfigError for an invalid combination, before anything runs.
    """
    cells: list[Cell] = []
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = {axis.field: value for axis, value in zip(axes, combination, strict=True)}
        flags = [argument for axis in axes for argument in axis.flags(values[axis.field])]
        name = _folder_name(values, {cell.name for cell in cells})
        cells.append(Cell(values, *parse([*flags, "--out", str(out / name)])))
    return cells


def _folder_name(values: dict[str, str], taken: set[str]) -> str:
    """`moco-m=0.9,moco-k=1024` with portable characters only, numbered if taken."""
    name = ",".join(f"{name.replace('_', '-')}={re.sub(r'[^A-Za-z0-9.+-]+', '-', v)}" for name, v in values.items())
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in numbered if candidate not in taken)


def run_sweep(
    cells: Sequence[Cell],
    train: Callable[[RunConfig, frozenset[str]], object],
    on_start: Callable[[Cell, str], None],
    *,
    redo: bool = False,
) -> None:
    """Finish every run, and fill in the outcome and results of its cell.

    train     trains a configuration, given the fields that only the recipe sets; its errors end the sweep, except
              DivergedError, which is an outcome
    on_start  called before each run is trained, with "run" or "resume"
    redo      train all runs again

    Raises ConfigError if a folder contains a run with other settings, and whatever `train` raises.
    """
    for cell in cells:
        if not redo and _has_ended(cell):
            _read_results(cell)
            continue
        resumable = not redo and any((cell.folder / "checkpoints").glob("step-*.safetensors"))
        on_start(cell, "resume" if resumable else "run")
        exists = (cell.folder / "config.json").exists() or (cell.folder / "status.json").exists()
        try:
            config = cell.config.replace(resume=resumable, overwrite=exists and not resumable)
            train(config, cell.from_recipe)
        except DivergedError:
            pass  # recorded in status.json
        except CheckpointError as error:
            raise CheckpointError(f"{error} (in a sweep: --overwrite trains all runs again)") from error
        _read_results(cell)


def _has_ended(cell: Cell) -> bool:
    """Whether the run has completed or diverged. Raises ConfigError if it had other settings."""
    if not (cell.folder / "status.json").exists():
        return False
    if read_status(cell.folder)["exit_code"] not in (ExitCode.DONE, ExitCode.DIVERGED):
        return False
    changed = [
        f"{name} is {requested!r} and was {recorded!r}"
        for name, requested, recorded in differences(_located(cell.config), _located(read_config(cell.folder)))
        if (name not in FREE_ON_RESUME or name in ("init", "init_prefix")) and _is_explicit(name, requested)
        if name not in ADAPTED_TO_IMAGES & cell.from_recipe
    ]
    if changed:
        raise ConfigError(
            f"{cell.folder} contains a finished run with other settings ({'; '.join(changed)}): choose another --out, "
            "or train all runs again with --overwrite"
        )
    return True


def _located(config: RunConfig) -> RunConfig:
    return config.replace(data=absolute_data(config.data.data))


def _is_explicit(name: str, value: Any) -> bool:
    """Whether a setting was chosen by the user, rather than left to be resolved at the start of the run."""
    return value not in (None, "auto") and value != RunConfig().flat()[name]


def _read_results(cell: Cell) -> None:
    """Read the outcome and results from the files of a run."""
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
        values = [r[recorded] for r in records if r.get(recorded) is not None and (r["step"] > 0) == trained]
        if values and math.isfinite(values[-1]):
            cell.results[name] = values[-1]


def paper_percent(cell: Cell) -> tuple[bool, float | None]:
    """(whether the paper has a result for this value, accuracy or None if training failed), for a single setting.

    Only on the data of the ablation recipes: beside one's own images, the numbers would be taken for comparable.
    """
    if len(cell.values) != 1 or cell.config.data.data != recipe("cifar10-demo").data.data:
        return False, None
    ((name, value),) = cell.values.items()
    published = PUBLISHED.get(name)
    if published is None:
        return False, None
    percent_of = {_normalise(text): percent for text, percent in published.percent.items()}
    return _normalise(value) in percent_of, percent_of.get(_normalise(value))


def _normalise(text: str) -> float | str:
    """The number that the text represents, if it is one: `0.9` and `0.90` are equal."""
    try:
        return float(text)
    except ValueError:
        return text


def write_json(path: Path, recipe: str, command: str, cells: Sequence[Cell]) -> None:
    """Write the settings, outcome and results of every run as JSON. Raises OSError."""
    runs = []
    for cell in cells:
        in_paper, percent = paper_percent(cell)
        record: dict[str, Any] = {"settings": cell.values, "folder": cell.name, "outcome": cell.outcome, **cell.results}
        runs.append(record | ({"paper_percent": percent} if in_paper else {}))
    content = {"recipe": recipe, "command": command, "git_commit": git_commit(), "versions": versions(), "runs": runs}
    write_atomically(path, json.dumps(content, indent=2) + "\n")
