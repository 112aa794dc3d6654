"""A sweep trains every combination once, resumes where it was stopped, and reports all results."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli import main
from fastmoco.commands.sweep import table
from fastmoco.commands.train_arguments import parse_train, train_arguments
from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError, DivergedError, ExitCode
from fastmoco.run.directory import RunDirectory, read_config, read_status
from fastmoco.sweep.plot import draw_sweep
from fastmoco.sweep.runs import Axis, Cell, paper_percent, plan, run_sweep, write_json
from pipelines.backends.two_view import TwoViewPipeline
from tests.run.test_train import RESIDENT, newest

FLAGS = [*RESIDENT, "--no-tensorboard", "--knn-every", "1", "--log-every", "1", "--checkpoint-every", "2"]


def sweep(out: Path, *arguments: str) -> int:
    return main(["sweep", "shapes", *FLAGS, "--out", str(out), *arguments])


def arguments_of_train(flags: list[str]) -> tuple[RunConfig, frozenset[str]]:
    given = train_arguments(flags)
    return given.config, given.from_recipe


# ---- axes ----------------------------------------------------------------------------------------------------------


def test_values_become_flags() -> None:
    axis = Axis.parse("moco-m=0,0.9,0.99")
    assert axis == Axis("moco_m", ("0", "0.9", "0.99"))
    assert axis.flags("0.9") == ["--moco-m", "0.9"]
    assert Axis.parse("head=100+50,512").flags("100+50") == ["--head", "100", "50"]
    assert [Axis.parse("symmetric=true,false").flags(v) for v in ("true", "false")] == [
        ["--symmetric"],
        ["--no-symmetric"],
    ]


def test_a_grid_has_every_combination_in_its_own_folder(tmp_path: Path) -> None:
    axes = [Axis.parse("moco-m=0,0.9"), Axis.parse("data=/a/b,/a b")]
    cells = plan(axes, arguments_of_train, tmp_path)
    assert [(cell.config.model.moco_m, cell.config.data.data) for cell in cells] == [
        *((0.0, ("/a/b",)), (0.0, ("/a b",))),
        *((0.9, ("/a/b",)), (0.9, ("/a b",))),
    ]
    assert [cell.name for cell in cells[:2]] == ["moco-m=0,data=-a-b", "moco-m=0,data=-a-b-2"]
    assert [cell.folder.parent for cell in cells] == [tmp_path] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes"], "nothing to vary: give --vary, such as fastmoco sweep shapes --vary moco-m=0,0.9,0.99"),
        (["shapes", "--vary"], "--vary needs a value"),
        (["shapes", "--vary", "moco-m"], "--vary 'moco-m': expected a setting and its values"),
        (["shapes", "--vary", "moco-m=,"], "--vary 'moco-m=,': expected a setting and its values"),
        (["shapes", "--vary", "moco-mm=0"], "no field 'moco_mm'; did you mean 'moco_m'?"),
        (["shapes", "--vary", "moco-m=0,2"], "--moco-m is 2.0, expected a number from 0 to 1"),
        (["shapes", "--vary", "moco-m=0,x"], "--moco-m is 'x', expected a number"),
        (["shapes", "--vary", "moco-m=0.9,0.9"], "0.9 is repeated"),
        (["shapes", "--vary", "moco-m=0,1", "--vary", "moco-m=0.5"], "--vary names a setting twice"),
        (["shapes", "--vary", "symmetric=yes"], "--vary symmetric=yes: expected true or false"),
        (["shapes", "--vary", "out=a,b"], "the sweep itself sets --out"),
        (["shapes", "--vary", "moco-m=0", "--resume"], "fastmoco sweep resumes by itself: remove --resume"),
        (["shapse", "--vary", "moco-m=0"], "unknown recipe, data set or folder 'shapse'; did you mean 'shapes'"),
        (["shapes", "--vary", "moco-m=0", "--gpu", "1"], "--gpu: choose the GPU with CUDA_VISIBLE_DEVICES"),
        (["shapes", "--vary", "moco-m=0", "--epohcs", "3"], "unknown argument '--epohcs'; did you mean --epochs"),
    ],
)
def test_bad_arguments_are_2_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == ExitCode.CONFIG
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_of_other_trainers_and_data_without_a_flag(tmp_path: Path, capsys, monkeypatch) -> None:
    assert Axis.parse("learning-rate=0.1,0.3") == Axis("lr", ("0.1", "0.3"))
    assert Axis.parse("weight_decay=0,1e-4").field == "wd"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main(["sweep", "photos", "--vary", "lr=0.1", "-b", "8"]) == ExitCode.DATA
    assert "photos holds no images" in capsys.readouterr().err
    assert main(["sweep", "photos", "--vary", "lr=0.1", "--output-dir", "photos/o", "-b", "1"]) == ExitCode.CONFIG
    assert "--batch-size is 1" in capsys.readouterr().err


def test_help_is_printed(capsys) -> None:
    assert main(["sweep", "--help"]) == ExitCode.DONE
    assert "--vary moco-m=0,0.9,0.99" in capsys.readouterr().out


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_sweep_is_resumed_and_a_finished_one_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Stopped by SIGTERM, as from a scheduler, in the middle of the second run."""
    monkeypatch.setattr("fastmoco.run.recorder.curves", lambda *arguments: None)
    out, vary = tmp_path / "sweep", ["--vary", "moco-m=0,0.9"]
    batches = 0

    def views(self: TwoViewPipeline, start: int, stop: int):
        nonlocal batches
        for batch in original(self, start, stop):
            batches += stop == 8  # the steps of a run; others are for views.png and evaluations
            if batches == 12:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    original = TwoViewPipeline.views
    with monkeypatch.context() as patch:
        patch.setattr(TwoViewPipeline, "views", views)
        assert sweep(out, *vary) == ExitCode.PREEMPTED
    folders = [out / "moco-m=0", out / "moco-m=0.9"]
    assert [read_status(folder)["state"] for folder in folders] == ["done", "preempted"]
    stopped_at = read_status(folders[1])["step"]
    assert 0 < stopped_at < 8
    capsys.readouterr()

    first = (folders[0] / "backbone.safetensors").stat().st_mtime_ns
    assert sweep(out, *vary) == ExitCode.DONE
    output = capsys.readouterr().out
    assert "sweep 2 of 2, resume: moco-m=0.9" in output
    assert "sweep 1 of 2" not in output
    assert f"resumed at step {stopped_at} of 8" in output
    assert (folders[0] / "backbone.safetensors").stat().st_mtime_ns == first
    assert read_status(folders[1])["state"] == "done"

    uninterrupted = tmp_path / "uninterrupted"
    assert main(["train", "shapes", *FLAGS, "--moco-m", "0.9", "--out", str(uninterrupted)]) == ExitCode.DONE
    resumed, expected = newest(folders[1]), newest(uninterrupted)
    assert all(bool((resumed[name] == tensor).all()) for name, tensor in expected.items())

    capsys.readouterr()
    assert sweep(out, *vary) == ExitCode.DONE
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(": 2 runs on shapes")
    assert lines[0].split("  ")[0].strip() == "moco-m"
    assert [line.split()[0] for line in lines[1:3]] == ["0", "0.9"]
    assert all(line.endswith("done") for line in lines[1:3]), "no published results beside those of other images"
    record = json.loads((out / "sweep.json").read_text())
    assert [run["settings"] for run in record["runs"]] == [{"moco_m": "0"}, {"moco_m": "0.9"}]
    assert all("paper_percent" not in run for run in record["runs"])
    assert all({"knn_before_percent", "knn_percent", "loss"} <= run.keys() for run in record["runs"])
    assert record["recipe"] == "shapes"
    assert record["command"].startswith("fastmoco sweep shapes")
    with Image.open(out / "sweep.png") as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 20

    assert sweep(out, *vary, "--epochs", "3") == ExitCode.CONFIG
    assert (
        "contains a finished run with other settings (epochs is 3 and was 2): choose another --out"
        in capsys.readouterr().err
    )


class FakeTraining:
    """Replaces training: writes the files of a run, or raises the given error, and records the calls."""

    def __init__(self, outcomes: dict[str, Exception | None]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[str, bool, bool]] = []

    def train(self, config: RunConfig, from_recipe: frozenset[str]) -> None:
        assert config.run.out is not None
        path = Path(config.run.out)
        self.calls.append((path.name, config.run.resume, config.run.overwrite))
        directory = RunDirectory.open(path, resume=config.run.resume, overwrite=config.run.overwrite)
        error = self.outcomes.get(path.name)
        directory.write_config(config)
        lines = [{"step": 0, "epoch": 0, "knn_top1_percent": 10.0}, {"step": 4, "epoch": 1, "loss": 2.5}]
        lines += [] if error else [{"step": 4, "epoch": 1, "knn_top1_percent": 100 * (config.model.moco_m or 0.0)}]
        directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = ExitCode.DIVERGED if isinstance(error, DivergedError) else 1 if error else ExitCode.DONE
        directory.write_status(step=4, epoch=1, exit_code=code)
        directory.close()
        if error is not None:
            raise error


def cells_of(out: Path, *vary: str, words: tuple[str, ...] = ()) -> tuple[list[Axis], list[Cell]]:
    axes = [Axis.parse(text) for text in vary]
    return axes, plan(axes, lambda flags: arguments_of_train([*words, *flags]), out)


@pytest.mark.slow
def test_a_recipes_queue_is_reduced_to_the_images_as_in_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again finds the run, which has another queue than the recipe."""
    line = ["sweep", "shapes", "--limit", "64", "--epochs", "1", "--width", "0.125", "--crop-size", "8"]
    line += ["--no-tensorboard", "--cpu-threads", "1", "--knn-every", "0", "--vary", "moco-m=0.9"]
    for _ in range(2):
        assert main([*line, "--out", str(tmp_path)]) == ExitCode.DONE
    assert read_config(tmp_path / "moco-m=0.9").model.moco_k == 64
    output = capsys.readouterr().out
    assert output.count("the recipe's 512 are more than the 64 images") == 1
    assert main([*line, "--moco-k", "512", "--out", str(tmp_path)]) == ExitCode.CONFIG
    assert "moco_k is 512 and was 64" in capsys.readouterr().err


def test_divergence_is_an_outcome_and_other_errors_end_the_sweep(tmp_path: Path) -> None:
    training = FakeTraining({"moco-m=0": DivergedError("not finite"), "moco-m=0.9": ConfigError("no")})
    _, cells = cells_of(tmp_path, "moco-m=0,0.9,0.99")
    with pytest.raises(ConfigError, match="no"):
        run_sweep(cells, training.train, lambda cell, mode: None)
    assert [cell.outcome for cell in cells] == ["diverged", "not run", "not run"]
    assert [name for name, _, _ in training.calls] == ["moco-m=0", "moco-m=0.9"]

    training.outcomes.pop("moco-m=0.9")
    _, cells = cells_of(tmp_path, "moco-m=0,0.9,0.99")
    run_sweep(cells, training.train, lambda cell, mode: None)
    # The diverged run is not repeated; the failed run left no checkpoint, so it starts again in its folder.
    assert training.calls[2:] == [("moco-m=0.9", False, True), ("moco-m=0.99", False, False)]
    assert [cell.outcome for cell in cells] == ["diverged", "done", "done"]
    assert [cell.knn_percent for cell in cells] == [None, 90.0, 99.0]

    run_sweep(cells, training.train, lambda cell, mode: None, redo=True)
    assert training.calls[4:] == [(f"moco-m={m}", False, True) for m in ("0", "0.9", "0.99")]


def test_the_table_and_the_plot_show_failed_and_missing_runs(tmp_path: Path) -> None:
    axes, cells = cells_of(tmp_path, "moco-m=0,0.9,0.95,0.999", words=("ablation-momentum",))
    training = FakeTraining({"moco-m=0": DivergedError("not finite")})
    run_sweep(cells[:3], training.train, lambda cell, mode: None)
    rows = table(cells, axes).splitlines()
    assert len({len(row) for row in rows[:5]}) == 1, "columns are aligned"
    assert rows[0].split("  ")[-1] == "paper, %"
    assert rows[1].split() == ["0", "10.0", "2.500", "diverged", "fails"]
    assert rows[2].split() == ["0.9", "10.0", "90.0", "2.500", "done", "55.2"]
    assert rows[3].split() == ["0.95", "10.0", "95.0", "2.500", "done"], "not in the paper"
    assert rows[4].split() == ["0.999", "not", "run", "59.0"]
    assert "He et al. 2020" in rows[5]
    draw_sweep(cells, axes, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width > 1.5 * image.height, "two panels"

    axes, cells = cells_of(tmp_path / "own", "moco-m=0.9,0.999")
    run_sweep(cells, FakeTraining({}).train, lambda cell, mode: None)
    assert "paper" not in table(cells, axes), "of one's own images, which the paper has not used"
    draw_sweep(cells, axes, tmp_path / "own.png")
    with Image.open(tmp_path / "own.png") as image:
        assert image.width < 1.5 * image.height, "one panel"


def test_a_grid_is_one_line_per_value_of_the_second_setting(tmp_path: Path) -> None:
    axes, cells = cells_of(tmp_path, "moco-m=0.5,0.9", "moco-k=16,32")
    run_sweep(cells, FakeTraining({}).train, lambda cell, mode: None)
    assert paper_percent(cells[0]) == (False, None), "only for a single setting"
    draw_sweep(cells, axes, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.width < 1.5 * image.height
    assert [row.split()[:2] for row in table(cells, axes).splitlines()[1:]] == [
        *(["0.5", "16"], ["0.5", "32"]),
        *(["0.9", "16"], ["0.9", "32"]),
    ]
    write_json(tmp_path / "sweep.json", "shapes", "fastmoco sweep", cells)
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["knn_percent"] for run in runs] == [50.0, 50.0, 90.0, 90.0]
    assert all("paper_percent" not in run for run in runs)


def test_published_results_are_found_for_any_spelling_of_a_number() -> None:
    config = parse_train(["ablation-momentum"])
    assert paper_percent(Cell({"moco_m": "0.90"}, config)) == (True, 55.2)
    assert paper_percent(Cell({"moco_m": "0"}, config)) == (True, None)
    assert paper_percent(Cell({"mechanism": "memory-bank"}, config)) == (True, 58.0)
    assert paper_percent(Cell({"moco_m": "0.5"}, config)) == (False, None)
    assert paper_percent(Cell({"seed": "0"}, config)) == (False, None)
    assert math.isclose(paper_percent(Cell({"moco_k": "65536"}, config))[1] or 0.0, 60.6)
