"""Accuracy over training time, from a run's metrics.jsonl and the durations of its sessions.

Training minutes include waiting for data. The trainer's clock stops for evaluations, checkpoints and the capture of a
CUDA graph; these, and indexing, decoding and compiling, count in the wall time only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoco.run.metrics import FILE_NAME, Record
from pipelines.files import write_atomically

_COLOURS = ("#2f5d9b", "#c05a2c", "#2e7d4f", "#6d4c8d", "#8a5a2b", "#b03a5b")


class Evaluation(NamedTuple):
    """kNN accuracy after a number of epochs and minutes of training."""

    epoch: int
    training_minutes: float
    knn_percent: float


def evaluations(records: Sequence[Record], batch_size: int) -> list[Evaluation]:
    """The evaluations of a run, oldest first, from the records of `read_metrics`.

    The accuracy is that on the encoder's output, as in the authors' demo, or on features if there is no other.
    A record has the images/s since the one before, on the trainer's clock: n steps of B images took n·B / rate seconds.
    """
    output, features = "knn_output_top1_percent", "knn_top1_percent"
    name = output if any(output in record for record in records) else features
    curve, seconds, last_step = [], 0.0, 0
    for record in records:
        if "images_per_s" in record:
            seconds += (record["step"] - last_step) * batch_size / record["images_per_s"]
            last_step = record["step"]
        if name in record:
            curve.append(Evaluation(record["epoch"], seconds / 60, record[name]))
    return curve


def first_at(curve: Sequence[Evaluation], percent: float) -> Evaluation | None:
    """The first evaluation with at least that accuracy."""
    return next((evaluation for evaluation in curve if evaluation.knn_percent >= percent), None)


class Sessions:
    """Durations of the processes that worked on a run, in a file beside its folder.

    A session that was killed has not recorded its end: it counts until the last write to the metrics.
    """

    def __init__(self, run: Path) -> None:
        self._file, self._metrics = run.with_name(run.name + ".sessions.json"), run / FILE_NAME

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the block as a session."""
        began = time.time()
        sessions = [*self._read(), {"began": began, "seconds": None}]
        self._write(sessions)
        try:
            yield
        finally:
            sessions[-1]["seconds"] = time.time() - began
            self._write(sessions)

    def seconds(self) -> list[float]:
        return [session["seconds"] for session in self._read()]

    def reset(self) -> None:
        """Forget all sessions of a run that starts again."""
        self._file.unlink(missing_ok=True)

    def _read(self) -> list[dict]:
        try:
            sessions = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        for session in sessions:
            if session["seconds"] is None:
                last_write = session["began"]
                with suppress(FileNotFoundError):
                    last_write = self._metrics.stat().st_mtime
                session["seconds"] = max(0.0, last_write - session["began"])
        return sessions

    def _write(self, sessions: list[dict]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps(sessions) + "\n")


def draw(
    recipes: Mapping[str, Mapping[int, Sequence[Evaluation]]], targets: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Write a PNG with a panel per recipe: kNN accuracy over training minutes, a line per seed, targets dashed.

    A ring marks the first evaluation that reached a target.
    """
    figure = Figure(figsize=(0.5 + 6 * len(recipes), 4.2), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    for number, (name, seeds) in enumerate(recipes.items(), start=1):
        axes = figure.add_subplot(1, len(recipes), number)
        for colour, (seed, curve) in zip(_COLOURS * len(seeds), seeds.items(), strict=False):
            minutes, percents = [e.training_minutes for e in curve], [e.knn_percent for e in curve]
            axes.plot(minutes, percents, color=colour, linewidth=1.4, marker=".", markersize=4, label=f"seed {seed}")
            for reached in filter(None, (first_at(curve, target) for target in targets[name])):
                point = (reached.training_minutes, reached.knn_percent)
                axes.plot(*point, "o", markersize=8, markerfacecolor="none", markeredgecolor=colour)
        for position, target in enumerate(sorted(targets[name], reverse=True)):
            axes.axhline(target, color="#999999", linewidth=1, linestyle=(0, (5, 4)))
            axes.annotate(
                f"{target:g} %",
                (0, target),
                xycoords=("axes fraction", "data"),
                xytext=(3, -3 if position else 3),  # above the highest target, below the others, which may be close
                textcoords="offset points",
                va="top" if position else "bottom",
                color="#777777",
                fontsize=8,
            )
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("training minutes, without evaluations", fontsize=8, color="#555555")
        axes.set_ylabel("kNN top-1 accuracy (%)", fontsize=8, color="#555555")
        axes.tick_params(labelsize=8, colors="#555555")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, format="png")
