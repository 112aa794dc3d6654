"""The page on one run, and the comparison of several: self-contained HTML that loads nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fastmoco.console import Fact
from fastmoco.errors import ConfigError, cannot_write
from fastmoco.report_page.charts import COLOURS, PANELS, charts
from fastmoco.report_page.commands import commands
from fastmoco.report_page.figures import PROBES, figures, probe_rows
from fastmoco.report_page.pictures import Picture, embedded
from fastmoco.report_page.render import render
from fastmoco.report_page.run_files import RunFiles
from fastmoco.report_page.settings import all_settings, differing_settings
from fastmoco.run.environment import version
from fastmoco.run.metrics import finite_number
from fastmoco.run.verdict import last_verdict
from pipelines.files import write_atomically

MARK = '<meta name="generator" content="fastmoco report">'  # by which a page of ours may be replaced
_VIEWS_BYTES, _PICTURE_BYTES = 600_000, 220_000
_PICTURES = {
    "views": ("Views", "Augmented views of images, query and key side by side", 46),
    "eval/retrieval": ("Nearest neighbours", "Images, each with those whose features are the most similar", 34),
    "eval/feature_map": ("Feature map", "Two-dimensional map of the features of images", 0),
}
_LABEL_FREE = {
    "alignment": ("{:.3f}", "squared distance between two views of an image; 0 is best"),
    "uniformity": ("{:.3f}", "0 if all features are equal, -4 if they spread over the whole sphere"),
    "effective_rank": ("{:.1f}", "directions in which the features vary"),
    "separation": ("{:.3f}", "alignment, divided by that of views of two images"),
}


_OF_THE_TERMINAL = ("folder", "otherwise")  # facts that are below, or advice for the next command


class Shown(NamedTuple):
    """A picture of a run with its title and a description for those who do not see it.

    least_rem  the width below which it is scrolled sideways, since its details would be too small
    """

    title: str
    alt: str
    picture: Picture
    least_rem: int


def make_page(runs: Sequence[RunFiles]) -> str:
    """The page on a run, or the comparison of several in the order given."""
    runs = _told_apart(runs)
    sections = [_section(run, with_pictures=len(runs) == 1) for run in runs]
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    shared = {"version": version(), "written": written, "charts": charts(runs), "mark": MARK}
    if len(runs) == 1:
        return render("run.html.j2", title=f"{runs[0].name}: fastmoco", run=sections[0], **shared)
    names = list(dict.fromkeys(figure.name for section in sections for figure in section["figures"]))
    rows = [
        (name, [next((f for f in section["figures"] if f.name == name), None) for section in sections])
        for name in names
    ]
    return render(
        "comparison.html.j2",
        title=f"{len(runs)} runs compared: fastmoco",
        runs=sections,
        colours=[number % COLOURS + 1 for number in range(len(runs))],
        figures=rows,
        differing=differing_settings(runs),
        **shared,
    )


def _told_apart(runs: Sequence[RunFiles]) -> Sequence[RunFiles]:
    """Several runs under their paths below the folder that holds all of them."""
    if len(runs) == 1:
        return runs
    try:
        base = os.path.commonpath([run.folder.parent for run in runs])
    except ValueError:  # on several drives
        return [replace(run, name=str(run.folder)) for run in runs]
    return [replace(run, name=run.folder.relative_to(base).as_posix()) for run in runs]


def write_page(page: str, path: Path) -> None:
    """Write the page, replacing only one of this command. Raises ConfigError; CheckpointError on a full disk."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ConfigError(f"{path} is a link, a folder or a device, which is left alone: choose another with --out")
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ConfigError(f"{path} exists and is no page of fastmoco report: choose another name with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page, shared=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _section(run: RunFiles, *, with_pictures: bool) -> dict[str, Any]:
    shown, missing = _pictures(run) if with_pictures else ([], [])
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "message": run.status.get("message") or "",
        "exit_code": run.status.get("exit_code"),
        "updated": _updated(run),
        "notes": [*run.notes, *missing],
        "verdict": last_verdict([run.status, *run.metrics]),
        "figures": figures(run),
        "facts": _facts(run),
        "views": [picture for picture in shown if picture.title == "Views"],
        "pictures": [picture for picture in shown if picture.title != "Views"],
        "probes": probe_rows(run),
        "label_free": _label_free(run),
        "evaluated_on": str(run.evaluation.get("data", {}).get("images", "")),
        "evaluations": _evaluations(run),
        "commands": commands(run),
        "settings": all_settings(run),
        "versions": [(name, str(v)) for name, v in run.status.get("versions", {}).items() if v is not None],
        "commit": run.status.get("git_commit") or "",
    }


def _updated(run: RunFiles) -> str:
    """When status.json was last written, in UTC."""
    try:
        return datetime.fromisoformat(run.status["updated"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (LookupError, TypeError, ValueError):
        return ""


def _facts(run: RunFiles) -> list[Fact]:
    """What the run said at its start and its machine; of an earlier run, the settings that matter most."""
    if run.start is not None:
        machine, facts = run.start.machine, [fact for fact in run.start.facts if fact.name not in _OF_THE_TERMINAL]
        cores, memory = machine.get("cores"), machine.get("memory_bytes")
        parts = [str(machine.get("processor", "")), f"{cores} cores" if cores else ""]
        parts += [f"{memory / 2**30:.0f} GiB of memory"] if isinstance(memory, int | float) else []
        parts.append(str(machine.get("system", "")))
        return [*facts, Fact("machine", ", ".join(filter(None, parts)))]
    config, none = run.config, "–"
    model, optim = config.model, config.optim
    return [
        Fact("data", " ".join(config.data.data)),
        Fact("views", f"{config.augment.crop_size or none} pixels, augmentation {config.augment.aug or none}"),
        Fact("encoder", f"{model.arch or none} × {model.width:g}, {model.stem} stem"),
        Fact(model.mechanism, f"{model.moco_k or none} keys, m {model.moco_m}, T {model.moco_t}"),
        Fact("batch", f"{optim.batch_size or none} images"),
        Fact("optimiser", f"SGD, lr {optim.lr}, wd {optim.wd}, {optim.epochs} epochs"),
        Fact("device", f"{config.run.device}, {config.run.amp}, pipeline {config.data.pipeline}"),
    ]


def _pictures(run: RunFiles) -> tuple[list[Shown], list[str]]:
    """Views, neighbours, feature map and confusion matrices, and a sentence for each that cannot be read."""
    wanted = [(run.picture(f"{name}.png"), *of_it) for name, of_it in _PICTURES.items()]
    for path in run.confusion_matrices:
        probe = PROBES.get(name := path.stem.removeprefix("confusion-"), name)
        wanted.append((path, f"Confusion matrix, {probe}", f"True class by predicted class of the {probe} probe", 0))
    shown, missing = [], []
    for path, title, alt, least_rem in wanted:
        if path is None:
            continue
        picture = embedded(path, _VIEWS_BYTES if title == "Views" else _PICTURE_BYTES)
        if picture is None:
            missing.append(f"{path.relative_to(run.folder)} is damaged and left out.")
        else:
            shown.append(Shown(title, alt, picture, least_rem))
    return shown, missing


def _label_free(run: RunFiles) -> list[Fact]:
    """Measures of `fastmoco eval` that need no labels, each with its meaning, and its verdict."""
    measured, facts = run.evaluation.get("label_free", {}), []
    for name, (shown, meaning) in _LABEL_FREE.items():
        if isinstance(measured.get(name), float | int):
            facts.append(Fact(name.replace("_", " "), shown.format(measured[name]), meaning))
    if isinstance(measured.get("verdict"), str):
        facts.append(Fact("verdict", measured["verdict"]))
    return facts


def _evaluations(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the evaluations during training, for readers who cannot see the charts."""
    records = [record for record in run.metrics if "loss" not in record and len(record) > 2]
    formats = {
        metric.field: (metric.name or panel.title, panel.value)
        for panel in PANELS
        for metric in (*panel.metrics, *([panel.level] if panel.level else []))
    }
    names = [name for name in formats if any(name in record for record in records)]
    header = ["epoch", "step", *(formats[name][0] for name in names)]
    rows = [[f"{r.get('epoch', 0):,}", f"{r['step']:,}", *(_cell(r, n, formats[n][1]) for n in names)] for r in records]
    return header, rows


def _cell(record: dict[str, Any], name: str, text: Any) -> str:
    value = finite_number(record.get(name))
    return "" if value is None else text(value)
