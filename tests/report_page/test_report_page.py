"""The page on a run: complete, self-contained and readable, for finished, active, failed and earlier runs."""

from __future__ import annotations

import base64
import math
import os
import re
import shlex
from pathlib import Path

import pytest

from fastmoco.backbones.options import parse_export
from fastmoco.cli import main
from fastmoco.commands.report_options import parse_report
from fastmoco.commands.train_arguments import parse_train
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.evaluation.options import parse_eval
from fastmoco.report_page.commands import commands
from fastmoco.report_page.page import make_page, write_page
from fastmoco.report_page.pictures import embedded
from fastmoco.report_page.render import TEMPLATES
from fastmoco.report_page.run_files import read_run
from fastmoco.run.directory import RunDirectory
from fastmoco.run.verdict import last_verdict
from tests.report_page.parsed_page import checked, page_of
from tests.report_page.sample_run import picture, records, write_run

# ---- content ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_has_everything(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for text in (
        "done 2026-01-02 03:04 UTC",
        "kNN top-1 60.0 % before training 40.0 %, raw pixels 48.4 %",
        "linear top-1 88.1 % fastmoco eval",
        "loss 4.500 chance 6.24",
        "speed 102 images/s median; waits 5 % for data",
        "40 of 40 steps, 4 epochs",
        "queue 512 keys as in the recipe shapes",
        "machine Test CPU, 2 cores, 8 GiB of memory, Linux-6",
        "few labels, 1% of the labels 50.0 % ± 1.5",
        "alignment 0.290 squared distance between two views",
        "verdict not collapsed",
        "--moco-k 512",
        "torch 2.11",
        "commit 0123456",
    ):
        assert text in page.text, text
    assert "elsewhere" not in page.text
    assert all(command.text in "\n".join(page.words) for command in commands(read_run(tmp_path / "run")))
    assert [image["alt"] for image in page.all("img")] == [
        "Augmented views of images, query and key side by side",
        "Images, each with those whose features are the most similar",
        "Two-dimensional map of the features of images",
        "True class by predicted class of the kNN probe",
        "True class by predicted class of the linear probe",
    ]
    assert [svg["aria-label"] for svg in page.all("svg")] == [
        "Loss over epochs: 4.500; chance 6.240",
        "Top-1 accuracy, % over epochs: kNN 60.0 %; linear, fastmoco eval 88.1 %; kNN of raw pixels 48.4 %",
        "Learning rate over epochs: 0.03",
        "Speed, images/s over epochs: 103",
        "Waiting for data, % over epochs: 5.0 %",
    ]


def test_a_run_without_labels_has_the_measures_that_need_none(tmp_path: Path) -> None:
    metrics = [line | {"device_memory_bytes": 3 * 2**30, "device_power_w": 350.0} for line in records(labelled=False)]
    page = page_of(write_run(tmp_path / "run", metrics=metrics, evaluated=False))
    assert "effective rank 24.0 before training 20.0, at most 128" in page.text
    assert "memory of the device 3.0 GiB" in page.text
    assert "power of the device 350 W on average" in page.text
    assert "Not evaluated yet" in page.text
    labels = [str(svg["aria-label"]).partition(" over")[0] for svg in page.all("svg")]
    assert labels[:4] == ["Loss", "Alignment (0 is best)", "Uniformity (lower is more even)", "Effective rank"]
    assert labels[-2:] == ["Memory of the device, GiB", "Power of the device, W"]


def test_the_latest_verdict_is_shown_with_its_remedy(tmp_path: Path) -> None:
    status = {"verdict": "input-bound: 41 % waiting", "remedy": "use --pipeline resident"}
    text = page_of(write_run(tmp_path / "run", status=status)).text
    assert "Is it learning? input-bound: 41 % waiting use --pipeline resident" in text
    other = write_run(tmp_path / "other")
    assert "verdict input-bound: 41 % waiting kNN" in page_of(tmp_path / "run", other).text
    run = read_run(other)
    run.metrics.extend([{"step": 40, "verdict": "collapsed", "remedy": "raise --moco-m"}, {"step": 41, "loss": 1.0}])
    assert last_verdict([run.status, *run.metrics]) == ("collapsed", "raise --moco-m")


def test_a_run_that_has_just_begun_and_one_that_failed(tmp_path: Path) -> None:
    begun = write_run(tmp_path / "begun", metrics=[], state="running", started=False, evaluated=False)
    for path in ("metrics.jsonl", "views.png", "status.json"):
        (begun / path).unlink()
    text = page_of(begun).text
    assert "Nothing was measured yet" in text
    assert "status.json is missing or damaged" in text
    failed = write_run(tmp_path / "failed", state="failed", message="the loss is not finite", evaluated=False)
    assert "the loss is not finite (exit code 5)" in page_of(failed).text


def test_an_active_run_that_is_silent_for_long_may_have_been_killed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", state="running")
    assert "Nothing was written" not in page_of(run).text
    for path in run.iterdir():
        os.utime(path, (1e9, 1e9))
    assert "if the run was killed, resume it" in page_of(run).text


def test_an_earlier_run_has_its_settings_and_the_chance_level_of_its_queue(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", started=False)).text
    assert f"chance {math.log(513):.2f}" in text
    assert "encoder resnet18 × 1" in text
    assert "40 of 40 steps, 4 epochs" in text


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    metrics = records()
    metrics[-2]["loss"] = None
    assert "loss 4.500" in page_of(write_run(tmp_path / "run", metrics=metrics)).text
    nowhere = [line | {"loss": None} if "loss" in line else line for line in records()]
    labels = [str(svg["aria-label"]) for svg in page_of(write_run(tmp_path / "nan", metrics=nowhere)).all("svg")]
    assert not any(label.startswith("Loss") for label in labels)


def test_many_records_are_drawn_as_few_points(tmp_path: Path) -> None:
    lines = [{"step": step, "epoch": step // 10, "loss": 6.0 if step < 5000 else 3.0} for step in range(1, 10_001)]
    html = make_page([read_run(write_run(tmp_path / "run", metrics=lines, evaluated=False))])
    assert len(html) < 250_000
    assert "Loss over epochs: 3.000" in html


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_a_comparison_has_the_settings_that_differ_and_final_figures(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", settings={"lr": 0.06, "out": str(tmp_path / "a")})
    b = write_run(
        tmp_path / "b", settings={"cos": True, "out": str(tmp_path / "b")}, metrics=records(2), evaluated=False
    )
    page = page_of(a, b)
    assert "Settings that differ a b --lr 0.06 0.03 --cos no yes Training" in page.text
    assert "kNN top-1 60.0 % before training 40.0 %, raw pixels 48.4 % 50.0 %" in page.text
    assert "linear top-1 88.1 % fastmoco eval –" in page.text
    labels = [str(svg["aria-label"]) for svg in page.all("svg")]
    assert labels[0] == "Loss over epochs: a 4.500; chance 6.240; b 5.500"
    assert labels[1] == "Top-1 accuracy, % over epochs: a 60.0 %; kNN of raw pixels 48.4 %; b 50.0 %"


def test_compared_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")).text
    assert "x/run y/run" in text
    assert "None: the settings of these runs are the same." in text


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_and_replaces_its_own_page_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    assert main(["report", str(run)]) == main(["report", str(run)]) == ExitCode.DONE
    assert "report.html" in capsys.readouterr().out
    checked((run / "report.html").read_text(encoding="utf-8"))
    assert main(["report", str(run), str(other)]) == ExitCode.DONE
    assert "2 runs compared" in (tmp_path / "report.html").read_text(encoding="utf-8")
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    assert main(["report", str(run), "-o", str(mine)]) == ExitCode.CONFIG
    assert "choose another name with --out" in capsys.readouterr().err
    assert mine.read_text() == "<p>mine"
    (tmp_path / "link.html").symlink_to(mine)
    with pytest.raises(ConfigError, match="is a link"):
        write_page("", tmp_path / "link.html")


def test_a_run_with_a_page_can_be_overwritten(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluated=False)
    main(["report", str(run)])
    RunDirectory.open(run, overwrite=True).close()
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.parametrize("settings", [{}, {"width": 0.25}, {"arch": "resnet50", "stem": "imagenet"}])
@pytest.mark.parametrize("state", ["done", "preempted", "no checkpoint"])
def test_every_command_is_accepted(tmp_path: Path, state: str, settings: dict) -> None:
    run = write_run(tmp_path / "a run's <folder>", state="done" if state == "done" else "preempted", settings=settings)
    if state == "no checkpoint":
        (run / "checkpoints" / "step-000000040.safetensors").unlink()
    shown = commands(read_run(run))
    parsers = {"train": parse_train, "eval": parse_eval, "export": parse_export, "report": parse_report}
    for command in shown:
        if command.language == "Python":
            compile(command.text, "<page>", "exec")
            continue
        program, name, *words = shlex.split(command.text)
        assert program == "fastmoco"
        parsers[name](words)
    first = shlex.split(shown[0].text)[2:]
    expected = {
        "done": ["--resume", str(run), "--epochs", "8"],
        "preempted": ["--resume", str(run)],
        "no checkpoint": ["--config", f"{run}/config.json", "--out", str(run), "--overwrite"],
    }
    assert first == expected[state]
    exports = [command.title for command in shown if command.title.startswith("Export")]
    if state == "no checkpoint":
        assert exports == []
    else:
        assert ("Export to timm" in exports) == ("width" not in settings)
        assert ("Export to detectron2" in exports) == ("arch" in settings)


# ---- size, colours ---------------------------------------------------------------------------------------------------


def test_large_pictures_are_reduced_and_small_ones_are_unchanged(tmp_path: Path) -> None:
    picture(tmp_path / "large.png", 2400, 1000)
    assert (tmp_path / "large.png").stat().st_size > 5_000_000
    large = embedded(tmp_path / "large.png", 600_000)
    assert large is not None
    assert large.uri.startswith("data:image/webp")
    assert len(large.uri) < 900_000
    assert large.width / large.height == pytest.approx(2.4, rel=0.01)
    picture(tmp_path / "small.png", 20, 20)
    small = embedded(tmp_path / "small.png", 600_000)
    assert small is not None
    assert base64.b64decode(small.uri.partition("base64,")[2]) == (tmp_path / "small.png").read_bytes()


def test_text_and_lines_have_contrast_in_both_schemes() -> None:
    """WCAG 2.1: 4.5 for text, 3 for graphical objects."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in style.split("@media")[:2])
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        for name in ("ink", "muted", "accent", "good", "bad", "wait"):
            for background in ("page", "raised"):
                assert contrast(scheme[name], scheme[background]) >= 4.5, (name, background)
        for name in scheme:
            assert not name.startswith("line-") or contrast(scheme[name], scheme["page"]) >= 3, name


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
