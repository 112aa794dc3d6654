"""The verdict on a run names what is wrong, from the metrics of real short runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run.directory import read_status
from fastmoco.run.metrics import read_metrics
from fastmoco.run.verdict import Signs, judge_run, last_verdict, signs_of

CHANCE = 6.2403  # ln 513

# Measured on drawn shapes, with a queue of 512: loss, alignment, uniformity, effective rank, kNN.
MEASURED: dict[str, tuple[tuple[float, float, float, float, float], str]] = {
    "1 epoch": ((3.7377, 0.035, -0.444, 17.4, 35.3), "learning"),
    "5 epochs": ((4.1485, 0.074, -1.443, 13.5, 59.0), "learning"),
    "untrained": ((3.7, 0.019, -0.059, 30.6, 31.0), "not yet"),
    "lr 1e-12": ((6.1911, 0.259, -0.576, 73.4, 18.5), "pinned at chance"),
    "lr 3": ((4.0694, 0.153, -0.223, 2.4, 21.6), "collapsed"),
    "lr 3, later": ((4.2238, 0.013, -0.135, 3.0, 17.0), "collapsed"),
    "moco-m 0": ((5.5963, 0.042, -0.236, 2.8, 19.6), "collapsed"),
    "constant": ((CHANCE, 0.0, -1e-6, 20.0, 10.0), "collapsed"),
}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_measured_runs_are_judged_with_labels_and_without(name: str, labelled: bool) -> None:
    (loss, alignment, uniformity, rank, knn), expected = MEASURED[name]
    signs = Signs(
        loss=loss,
        chance_loss=CHANCE,
        keys_replaced=4,
        alignment=alignment,
        uniformity=uniformity,
        effective_rank=rank,
        knn_percent=knn if labelled else None,
        knn_first_percent=31.0 if labelled else None,
        knn_pixels_percent=39.4 if labelled else None,
        data_wait_percent=5.0,
    )
    verdict, remedy = judge_run(signs)
    assert verdict == expected
    assert "\n" not in remedy
    assert "--" in remedy or "train on" in remedy


def test_knn_that_does_not_rise_is_not_learning() -> None:
    signs = Signs(loss=4.0, chance_loss=CHANCE, knn_percent=30.5, knn_first_percent=31.0)
    assert judge_run(signs).verdict == "not yet"
    assert "30.5 % is no better than at the start (31.0 %)" in judge_run(signs).remedy


def test_knn_below_that_of_raw_pixels_is_said() -> None:
    signs = Signs(loss=4.0, chance_loss=CHANCE, knn_percent=35.3, knn_first_percent=31.0, knn_pixels_percent=39.4)
    verdict, remedy = judge_run(signs)
    assert verdict == "learning"
    assert "below that of raw pixels (39.4 %)" in remedy


def test_a_low_loss_means_nothing_before_the_queue_was_filled() -> None:
    verdict, remedy = judge_run(Signs(loss=2.0, chance_loss=11.09, keys_replaced=0.1, uniformity=-1.5))
    assert verdict == "not yet"
    assert remedy.startswith("10% of the queue's random first keys are replaced")


@pytest.mark.parametrize(
    ("wait", "expected"), [(19.9, "learning"), (41.2, "learning, input-bound: 41 % waiting"), (None, "learning")]
)
def test_waiting_for_images_is_said_beside_the_state(wait: float | None, expected: str) -> None:
    verdict, remedy = judge_run(Signs(loss=4.0, chance_loss=CHANCE, uniformity=-1.0, data_wait_percent=wait))
    assert verdict == expected
    assert ("1.7 times as fast" in remedy) == (wait == 41.2)


def test_a_collapsed_run_is_not_told_to_load_faster() -> None:
    signs = Signs(loss=CHANCE, chance_loss=CHANCE, uniformity=-1e-6, data_wait_percent=90)
    assert judge_run(signs).verdict == "collapsed"
    assert "--workers" not in judge_run(signs).remedy
    pinned = judge_run(Signs(loss=CHANCE, chance_loss=CHANCE, data_wait_percent=90)).verdict
    assert pinned == "pinned at chance, input-bound: 90 % waiting"


def test_few_images_or_dimensions_are_no_collapse() -> None:
    signs = Signs(chance_loss=CHANCE, loss=4.0, effective_rank=4.2)
    assert judge_run(signs).verdict == "collapsed"
    assert judge_run(replace(signs, most_directions=7)).verdict == "learning"


def test_signs_are_those_of_the_last_evaluation() -> None:
    records: list[dict[str, Any]] = [
        {"step": 0, "epoch": 0, "knn_top1_percent": 10.0, "uniformity": -0.1, "knn_pixels_top1_percent": 30.0},
        {"step": 5, "epoch": 0, "loss": 6.0, "data_wait_percent": 80.0},
        {"step": 10, "epoch": 1, "knn_top1_percent": 20.0, "uniformity": -0.2},
        {"step": 15, "epoch": 1, "loss": 5.0, "data_wait_percent": 10.0},
        {"step": 20, "epoch": 2, "loss": float("nan"), "data_wait_percent": 20.0},
        {"step": 20, "epoch": 2, "knn_top1_percent": 40.0, "uniformity": -0.9, "alignment": 0.1},
        {"step": 25, "epoch": 2, "loss": 1.0, "data_wait_percent": 90.0},
    ]
    signs = signs_of(records, CHANCE, batch_size=16, queue=640)
    assert signs == Signs(
        loss=5.0,
        chance_loss=CHANCE,
        keys_replaced=0.5,
        alignment=0.1,
        uniformity=-0.9,
        knn_percent=40.0,
        knn_first_percent=10.0,
        knn_pixels_percent=30.0,
        data_wait_percent=15.0,
    )
    assert signs_of([], CHANCE, batch_size=16, queue=None) == Signs(chance_loss=CHANCE)


TINY = [
    "--limit",
    "64",
    "--batch-size",
    "16",
    "--bn-splits",
    "1",
    "--moco-k",
    "16",
    "--width",
    "0.125",
    "--amp",
    "fp32",
]
TINY += ["--arch", "resnet18", "--crop-size", "8", "--device", "cpu", "--pipeline", "resident", "--workers", "1"]
TINY += ["--knn-every", "1", "--knn-k", "5", "--cpu-threads", "1", "--no-tensorboard"]


@pytest.mark.parametrize("labels", [[], ["--no-labels"]], ids=["labelled", "unlabelled"])
def test_every_evaluation_is_judged_printed_and_recorded(tmp_path: Path, capsys, labels: list[str]) -> None:
    assert main(["train", *TINY, *labels, "--epochs", "2", "--lr", "1e-12", "--out", str(tmp_path)]) == ExitCode.DONE
    printed = capsys.readouterr().out.splitlines()
    evaluations = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" not in record]
    assert "verdict" not in evaluations[0], "nothing has been trained"
    assert all({"verdict", "remedy", "alignment", "uniformity", "effective_rank"} <= set(e) for e in evaluations[1:])
    lines = [line for line in printed if line.startswith("is it learning? ")]
    assert lines == [f"is it learning? {e['verdict']}: {e['remedy']}" for e in evaluations[1:]]
    done = printed.index("done")
    assert printed[done + 1].startswith(f"  is it learning?  {evaluations[-1]['verdict']}")
    if labels:
        assert any(line.startswith("  uniformity ") and "lower is better" in line for line in printed[done:])
    assert last_verdict([read_status(tmp_path)]) == last_verdict(evaluations)

    assert main(["train", "--resume", str(tmp_path), "--epochs", "3"]) == ExitCode.DONE
    resumed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in resumed if "verdict" in record] == [1, 2, 3]
