"""The figures of a run that people ask for first, as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastmoco.console import duration
from fastmoco.report_page.charts import Metric, chance_loss, points
from fastmoco.report_page.run_files import RunFiles
from fastmoco.run.metrics import finite_number, finite_values

PROBES = {"knn": "kNN", "linear": "linear", "logistic": "logistic regression", "few-label": "few labels"}


class Figure(NamedTuple):
    """`note` says what the value is to be compared with."""

    name: str
    value: str
    note: str = ""


def figures(run: RunFiles) -> list[Figure]:
    """What is known of accuracy, loss, features, speed and cost, the most telling first."""
    found = [_knn(run), *_probes(run), _loss(run), _rank(run), *_cost(run)]
    return [figure for figure in found if figure is not None]


def probe_rows(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Name, settings, top-1 and top-5 of every probe of `fastmoco eval`."""
    rows = []
    for probe in run.evaluation.get("probes", []):
        amount = probe.get("amount")
        name = _probe_name(probe) + (f", {amount} of the labels" if amount else "")
        settings = probe.get("settings")
        shown = ", ".join(f"{_words(n)} {_text(v)}" for n, v in settings.items()) if isinstance(settings, dict) else ""
        spread = finite_number(probe.get("spread_percent"))
        top1 = _percent(probe.get("top1_percent")) + (f" ± {spread:.1f}" if spread is not None else "")
        rows.append((name, shown, top1, _percent(probe.get("top5_percent"))))
    return rows


def _knn(run: RunFiles) -> Figure | None:
    values = finite_values(run.metrics, "knn_top1_percent")
    if not values:
        return None
    pixels, notes = finite_values(run.metrics, "knn_pixels_top1_percent"), []
    if len(values) > 1:
        notes.append(f"before training {values[0]:.1f} %")
    if pixels:
        notes.append(f"raw pixels {pixels[0]:.1f} %")
    return Figure("kNN top-1", f"{values[-1]:.1f} %", ", ".join(notes))


def _probes(run: RunFiles) -> Iterable[Figure]:
    for probe in run.evaluation.get("probes", []):
        if probe["probe"] != "knn" and not probe.get("amount") and finite_number(probe.get("top1_percent")) is not None:
            yield Figure(f"{_probe_name(probe)} top-1", _percent(probe["top1_percent"]), "fastmoco eval")


def _probe_name(probe: Mapping[str, Any]) -> str:
    name = str(probe["probe"])
    return PROBES.get(name, name)


def _loss(run: RunFiles) -> Figure | None:
    values, chance = finite_values(run.metrics, "loss"), chance_loss(run)
    if not values:
        return None
    return Figure("loss", f"{values[-1]:.3f}", "" if chance is None else f"chance {chance:.2f}")


def _rank(run: RunFiles) -> Figure | None:
    values = finite_values(run.metrics, "effective_rank")
    if not values:
        return None
    before = f"before training {values[0]:.1f}, " if len(values) > 1 else ""
    return Figure("effective rank", f"{values[-1]:.1f}", f"{before}at most {run.config.model.moco_dim:,}")


def _cost(run: RunFiles) -> Iterable[Figure]:
    steps, rates = points(run, Metric("images_per_s"))
    batch = run.config.optim.batch_size
    if rates:
        wait = finite_values(run.metrics, "data_wait_percent")
        note = f"median; waits {statistics.median(wait):.0f} % for data" if wait else "median"
        yield Figure("speed", f"{statistics.median(rates):,.0f} images/s", note)
    if rates and isinstance(batch, int):
        spans = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
        seconds = [span * batch / rate for span, rate in zip(spans, rates, strict=True) if rate > 0 and span > 0]
        epochs = run.config.optim.epochs
        note = f"{run.step:,} of {run.steps:,} steps, {epochs:,} epochs" if run.steps and epochs else ""
        yield Figure("time of training", duration(sum(seconds)), note)
    if memory := finite_values(run.metrics, "device_memory_bytes"):
        yield Figure("memory of the device", f"{max(memory) / 2**30:.1f} GiB", "at most")
    if power := finite_values(run.metrics, "device_power_w"):
        yield Figure("power of the device", f"{statistics.fmean(power):.0f} W", "on average")


def _percent(value: Any) -> str:
    percent = finite_number(value)
    return "" if percent is None else f"{percent:.1f} %"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
