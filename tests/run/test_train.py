"""Small runs end to end: their output, and bit-identical results when stopped at any step and resumed."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torchvision.models import resnet18

from fastmoco.cli import main
from fastmoco.commands.train_arguments import parse_train
from fastmoco.errors import ExitCode, Preempted
from fastmoco.run.metrics import read_metrics
from fastmoco.run.preemption import StopFlag
from fastmoco.step.schedules import lr_at
from fastmoco.trainer import Trainer, train
from pipelines.backends.two_view import TwoViewPipeline
from tests.oddities import encode, picture

TINY = ["--limit", "32", "--batch-size", "8", "--bn-splits", "2", "--moco-k", "16", "--width", "0.125", "--epochs", "2"]
TINY += ["--arch", "resnet18", "--crop-size", "8", "--amp", "fp32", "--knn-k", "5", "--device", "cpu"]
TINY += ["--workers", "1", "--seed", "3", "--cpu-threads", "2"]
RESIDENT = [*TINY, "--pipeline", "resident"]
KNN = tuple(f"knn_{of}top1_percent" for of in ("", "output_", "pixels_"))
EXACT = ("step", "epoch", "loss", "lr", *KNN, "skipped_steps")


def trained(out: Path, *arguments: str | Path, settings: list[str] = RESIDENT) -> Path:
    assert main(["train", *settings, *map(str, arguments), "--out", str(out)]) == ExitCode.DONE
    return out


def newest(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the last checkpoint: parameters, statistics, queue, optimiser and sums."""
    return load_file(max((run / "checkpoints").glob("*.safetensors")))


def exact_metrics(run: Path) -> list[dict[str, Any]]:
    """Metrics without measured times and rates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name in EXACT} for line in lines]


def assert_same_run(run: Path, expected: Path) -> None:
    state, expected_state = newest(run), newest(expected)
    assert state.keys() == expected_state.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected_state[name])] == []
    assert exact_metrics(run) == exact_metrics(expected)
    assert (run / "backbone.safetensors").read_bytes() == (expected / "backbone.safetensors").read_bytes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 unlabelled files of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        pixels = np.roll(picture(14 + i, 60 - i), 2 * i, axis=1)
        (folder / f"{i:02}.jpg").write_bytes(encode(pixels, "JPEG", quality=90))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps on shapes, with all outputs enabled."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return trained(out, "--log-every", "2", "--knn-every", "1", "--checkpoint-every", "4", "--cos")


# ---- output of a run -------------------------------------------------------------------------------------------------


def test_a_run_writes_all_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {
        *("config.json", "status.json", "metrics.jsonl", "tb", "views.png", "curves.png", "checkpoints"),
        *("start.json", "backbone.safetensors"),
    }
    assert any((finished / "tb").iterdir())
    for picture_name in ("views.png", "curves.png"):
        with Image.open(finished / picture_name) as image:
            assert min(image.size) > 100
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert sorted(path.name for path in (finished / "checkpoints").glob("*.safetensors")) == [
        "step-000000004.safetensors",
        "step-000000008.safetensors",
    ]


def test_status_and_config_are_those_of_the_run(finished: Path) -> None:
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"], status["epoch"]) == ("done", 0, 8, 2)
    config = json.loads((finished / "config.json").read_text())
    assert config["optim"]["batch_size"] == 8
    assert config["data"]["pipeline"] == "resident"
    assert config["model"]["stem"] == "cifar"
    assert config["optim"]["lr"] == pytest.approx(0.03 * 8 / 16)  # unset fields are resolved


def test_metrics_have_their_fields_in_order(finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4, 4, 6, 8, 8]
    assert [record["epoch"] for record in records] == [0, 0, 1, 1, 1, 2, 2]
    geometry = {"alignment", "uniformity", "effective_rank"}
    assert set(records[0]) == {"step", "epoch", *KNN, *geometry}
    assert set(records[-1]) == {"step", "epoch", *KNN[:2], "verdict", "remedy", *geometry}
    logs = [record for record in records if "loss" in record]
    assert [record["step"] for record in logs] == [2, 4, 6, 8]
    for record in logs:
        assert set(record) == {"step", "epoch", "loss", "lr", "images_per_s", "data_wait_percent"}
        assert 0 < record["loss"] < 10 * math.log(17)
        assert record["images_per_s"] > 0
        assert 0 <= record["data_wait_percent"] <= 100
        rate = {"schedule": "cosine", "base_lr": 0.03 * 8 / 16, "epochs": 2, "steps_per_epoch": 4}
        assert record["lr"] == pytest.approx(lr_at(record["step"] - 1, **rate))
    evaluated = [record for record in records if "knn_top1_percent" in record]
    assert [record["step"] for record in evaluated] == [0, 4, 8]
    assert all(0 <= record["knn_top1_percent"] <= 100 for record in evaluated)


def test_the_backbone_is_that_of_the_last_checkpoint(finished: Path) -> None:
    backbone, state = load_file(finished / "backbone.safetensors"), newest(finished)
    prefix = "model/query.backbone."
    assert {prefix + name for name in backbone} == {name for name in state if name.startswith(prefix)}
    for name, tensor in backbone.items():
        assert torch.equal(tensor, state[prefix + name]), name


def test_the_backbone_loads_into_torchvision(tmp_path: Path) -> None:
    """At full width with the ImageNet stem, only the classifier is missing."""
    flags = ["--width", "1", "--stem", "imagenet", "--epochs", "1", "--limit", "8", "--moco-k", "8", "--knn-every", "0"]
    out = trained(tmp_path / "run", *flags)
    backbone = load_file(out / "backbone.safetensors")
    missing, unexpected = resnet18().load_state_dict(backbone, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"]
    assert unexpected == []


def test_the_narrow_backbone_has_torchvisions_names(finished: Path) -> None:
    names = set(resnet18().state_dict()) - {"fc.weight", "fc.bias"}
    backbone = load_file(finished / "backbone.safetensors")
    assert set(backbone) == names
    assert backbone["conv1.weight"].shape == (8, 3, 3, 3)


def test_console_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trained(tmp_path / "run", "--epochs", "1", "--knn-every", "1")
    out = capsys.readouterr().out
    for text in (
        "data",
        "shapes/train: 32 images of 32×32",
        "before training: kNN",
        "epoch 1: kNN",
        "kNN top-1",
        "written",
    ):
        assert text in out


# ---- kinds of runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["torch", "dataloader"])
def test_every_pipeline_trains(pipeline: str, tmp_path: Path) -> None:
    flags = ["--pipeline", pipeline, "--workers", "0", "--epochs", "1"]
    out = trained(tmp_path / "run", *flags, settings=TINY)
    assert json.loads((out / "config.json").read_text())["data"]["pipeline"] == pipeline
    losses = [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    assert losses
    assert all(map(math.isfinite, losses))


def test_torch_and_resident_have_the_same_losses(photos: Path, tmp_path: Path) -> None:
    """The views are equal up to rounding, so the losses are nearly the same in every step."""
    losses = []
    for pipeline in ("torch", "resident"):
        flags = ["--data", photos, "--pipeline", pipeline, "--workers", "0", "--log-every", "1", "--knn-every", "0"]
        out = trained(tmp_path / pipeline, *flags, settings=TINY)
        losses.append([record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record])
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_an_unlabelled_folder_reports_alignment_and_uniformity(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmoco.evaluation.online.PAIRS", 64)
    out = trained(tmp_path / "run", "--data", photos, "--epochs", "1", "--knn-every", "1")
    evaluated = [record for record in read_metrics(out / "metrics.jsonl") if "alignment" in record]
    assert [record["step"] for record in evaluated] == [0, 4]
    for record in evaluated:
        assert set(record) - {"verdict", "remedy"} == {"step", "epoch", "alignment", "uniformity", "effective_rank"}
        assert record["alignment"] > 0
        assert record["uniformity"] < 0
        assert record["effective_rank"] >= 1
    assert not any("knn_top1_percent" in record for record in evaluated)


@pytest.mark.parametrize(
    "flags",
    [
        ["--symmetric"],
        ["--mlp"],
        ["--head", "24", "12"],
        ["--bn-splits", "1"],
        ["--aug-plus", "--moco-m-cos", "--warmup-epochs", "1"],
        ["--schedule", "1"],
        ["--exclude-bn-from-wd", "--deterministic"],
        ["--amp", "bf16"],
    ],
    ids=" ".join,
)
def test_variants_train(flags: list[str], tmp_path: Path) -> None:
    out = trained(tmp_path / "run", "--limit", "16", "--knn-every", "0", "--no-tensorboard", *flags)
    (*_, last) = read_metrics(out / "metrics.jsonl")
    assert last["step"] == 4
    assert math.isfinite(last["loss"])
    if "--head" in flags or "--mlp" in flags:
        layers = [
            tuple(t.shape) for name, t in newest(out).items() if name.startswith("model/query.head.") and t.ndim > 1
        ]
        widths = [24, 12] if "--head" in flags else [64]
        assert sorted(layers) == sorted(zip([*widths, 128], [64, *widths], strict=True))


def test_a_run_is_determined_by_its_seed(finished: Path, tmp_path: Path) -> None:
    flags = ["--log-every", "2", "--knn-every", "1", "--cos"]
    assert_same_run(trained(tmp_path / "repeated", *flags), finished)
    other = newest(trained(tmp_path / "other", *flags, "--seed", "4"))
    assert not torch.equal(other["queue/keys"], newest(finished)["queue/keys"])


def test_the_key_encoder_and_the_queue_are_updated(finished: Path) -> None:
    state = newest(finished)
    assert int(state["queue/pointer"]) == 8 * 8 % 16
    torch.testing.assert_close(state["queue/keys"].norm(dim=1), torch.ones(16))
    query, key = (state[f"model/{encoder}.backbone.layer4.0.conv1.weight"] for encoder in ("query", "key"))
    assert 0 < (query - key).norm() < query.norm()


# ---- stop and resume -------------------------------------------------------------------------------------------------

STEPS = 8
BASE = ["--no-tensorboard", "--knn-every", "1", "--cos", "--moco-m-cos"]


def run_until(out: Path, stop_at: int | None, arguments: list[str]) -> None:
    """Run until SIGTERM arrives while batch `stop_at` is being loaded."""

    def views(self: TwoViewPipeline, start: int, stop: int):
        for step, batch in enumerate(original(self, start, stop), start):
            if step == stop_at and stop == STEPS:  # of the run; others are for views.png and evaluations
                signal.raise_signal(signal.SIGTERM)
            yield batch

    original = TwoViewPipeline.views
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoViewPipeline, "views", views)
        train(parse_train([*RESIDENT, *BASE, "--out", str(out), *arguments]), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs by logging interval."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for log_every in (1, 3):
        run_until(folder / str(log_every), None, ["--log-every", str(log_every)])
    return {log_every: folder / str(log_every) for log_every in (1, 3)}


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=2, unique=True).map(sorted),
    log_every=st.sampled_from([1, 3]),
    checkpoint_every=st.sampled_from([None, 1, 3]),
)
@example(stops=[0], log_every=3, checkpoint_every=None)
@example(stops=[3, 4], log_every=3, checkpoint_every=3)
@example(stops=[STEPS - 1], log_every=1, checkpoint_every=None)
def test_a_run_stopped_anywhere_resumes_bit_identically(
    uninterrupted: dict[int, Path], stops: list[int], log_every: int, checkpoint_every: int | None
) -> None:
    """Parameters, statistics, queue, optimiser and metrics equal those of the uninterrupted run."""
    arguments = ["--log-every", str(log_every)]
    arguments += [] if checkpoint_every is None else ["--checkpoint-every", str(checkpoint_every)]
    with tempfile.TemporaryDirectory() as folder:
        out, resume = Path(folder) / "run", []
        for stop_at in stops:
            with pytest.raises(
                Preempted,
                match=rf"stopped by SIGTERM at step {stop_at + 1}, saved: resume with: fastmoco train --resume",
            ):
                run_until(out, stop_at, [*arguments, *resume])
            resume = ["--resume"]
            status = json.loads((out / "status.json").read_text())
            assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, stop_at + 1)
        run_until(out, None, [*arguments, *resume])
        assert_same_run(out, uninterrupted[log_every])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_killed_anywhere_resumes_from_its_last_checkpoint(
    uninterrupted: dict[int, Path], tmp_path: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process has not saved: metrics are ahead of the checkpoint, and a temporary file is left."""
    out, step = tmp_path / "run", 4 + lost

    class Killed(BaseException):
        pass

    def killed(self: Trainer, lr: float):
        if self.state.step > step:
            raise Killed
        return log(self, lr)

    log = Trainer._log
    monkeypatch.setattr(Trainer, "_log", killed)
    with pytest.raises(Killed):
        run_until(out, None, ["--log-every", "1"])
    monkeypatch.undo()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')
    (out / "checkpoints" / "step-000000008.safetensors.tmp").write_bytes(bytes(10))
    run_until(out, None, ["--log-every", "1", "--resume"])
    assert_same_run(out, uninterrupted[1])
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("flags", [["--symmetric", "--mlp"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_other_kinds_of_runs_resume_bit_identically(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--log-every", "2", "--knn-every", "0"]
    run_until(tmp_path / "uninterrupted", None, flags)
    with pytest.raises(Preempted):
        run_until(tmp_path / "run", 2, flags)
    run_until(tmp_path / "run", None, [*flags, "--resume"])
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_a_resumed_run_needs_no_flags_but_the_folder(uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    """Its settings are read from config.json."""
    with pytest.raises(Preempted):
        run_until(tmp_path / "run", 4, ["--log-every", "3"])
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == ExitCode.DONE
    assert_same_run(tmp_path / "run", uninterrupted[3])


def test_the_flag_keeps_the_first_signal_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopFlag() as stop, stop.deferred():
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        assert stop.name == "SIGINT"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ---- real signals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a run in its own process, with stderr in the file `errors`, so that no worker can block on a pipe."""
    started: list[subprocess.Popen[bytes]] = []

    def call(out: Path, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fastmoco", "train", *TINY, *BASE, "--out", str(out), *arguments]
        (tmp_path / "errors").unlink(missing_ok=True)  # a process of a killed run may still write to the old file
        with (tmp_path / "errors").open("wb") as errors:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()


def wait_for(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has saved a checkpoint of that step."""
    deadline = time.monotonic() + 120
    while not any(int(p.name[5:14]) >= step for p in (run / "checkpoints").glob("*.safetensors")):
        assert process.poll() is None, (run.parent / "errors").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Starts a command in its own process group and forwards SIGTERM to it.
LAUNCHER = """
import signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
sys.exit(child.wait())
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_real_kills_and_signals(start, tmp_path: Path) -> None:
    """Killed, stopped by SIGTERM, then finished, with workers: equals the uninterrupted run and leaves no process."""
    flags = ["--pipeline", "torch", "--workers", "1", "--epochs", "6", "--checkpoint-every", "1", "--knn-every", "0"]
    process = start(tmp_path / "run", *flags)
    wait_for(tmp_path / "run", 3, process)
    process.kill()
    process.wait(timeout=60)

    process = start(tmp_path / "run", *flags, "--resume")
    wait_for(tmp_path / "run", 8, process)
    workers = children_of(process.pid)
    process.terminate()
    assert process.wait(timeout=60) == ExitCode.PREEMPTED
    errors = (tmp_path / "errors").read_text()
    at_once, last = errors.splitlines()
    assert at_once.startswith("fastmoco: SIGTERM: stopping when this step is done and saved")
    assert last.startswith("fastmoco: stopped by SIGTERM at step ")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in workers):
        assert time.monotonic() < deadline, "a worker outlived the run"
        time.sleep(0.05)

    # Also in their own processes: sums are rounded differently if another test has changed the number of threads.
    assert start(tmp_path / "run", *flags, "--resume").wait(timeout=120) == ExitCode.DONE
    uninterrupted = start(tmp_path / "uninterrupted", *flags, "--workers", "0", "--checkpoint-every", "24")
    assert uninterrupted.wait(timeout=120) == ExitCode.DONE
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start, tmp_path: Path) -> None:
    """SIGSTOP holds both signals back until they arrive together; the second one prevents saving."""
    process = start(tmp_path / "run", "--pipeline", "resident", "--epochs", "1000", "--knn-every", "0")
    wait_for(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", process.returncode)
    assert (
        "before the state was saved: resume from the last checkpoint with: fastmoco train --resume" in status["message"]
    )
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert load_file(checkpoint)


@pytest.mark.slow
def test_a_signal_to_the_group_of_a_launcher_saves(tmp_path: Path) -> None:
    """A launcher in the same group forwards the signal that it gets itself, as `uv run` does: the run gets it twice."""
    flags = ["--pipeline", "resident", "--epochs", "1000", "--knn-every", "0", "--out", str(tmp_path / "run")]
    run = [sys.executable, "-m", "fastmoco", "train", *TINY, *BASE, *flags]
    with (tmp_path / "errors").open("wb") as errors:
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, *run], stderr=errors, start_new_session=True)
    try:
        wait_for(tmp_path / "run", 4, launcher)
        os.killpg(launcher.pid, signal.SIGTERM)
        assert launcher.wait(timeout=120) == ExitCode.PREEMPTED, (tmp_path / "errors").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
