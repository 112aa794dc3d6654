"""The command line reports errors in one line with the right exit code, and destroys no data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.commands.train_arguments import parse_train
from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError, ExitCode
from pipelines.augment.presets import CIFAR
from pipelines.plan.planner import Planner
from tests.oddities import fill

TINY = ["--limit", "16", "--batch-size", "8", "--bn-splits", "2", "--moco-k", "16", "--width", "0.125", "--epochs", "1"]
TINY += ["--arch", "resnet18", "--crop-size", "8", "--amp", "fp32", "--knn-every", "0", "--no-tensorboard"]
TINY += ["--device", "cpu", "--pipeline", "resident", "--workers", "1"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run `fastmoco train` with tiny settings and more flags; returns the exit code and the output."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["train", *TINY, *map(str, arguments)])
        captured = capsys.readouterr()
        if code == ExitCode.DONE:
            return code, captured.out
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith(("fastmoco: error: ", "fastmoco: stopped by "))
        assert "Traceback" not in captured.out + captured.err
        return code, captured.err

    return call


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run on shapes."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *TINY, "--out", str(out)]) == ExitCode.DONE
    return out


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sise", "8"], "unknown argument '--batch-sise'; did you mean --batch-size?"),
        (["--batch-size"], "--batch-size"),
        (["--batch-size", "many"], "many"),
        (["--batch-size", "1"], "--batch-size is 1, expected 2 or more"),
        (["--batch-size", "9"], "--batch-size 9 cannot be split into 2 equal groups"),
        (["--lr", "-1"], "--lr is -1.0, expected a number above 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--moco-m", "1.5"], "--moco-m is 1.5, expected a number from 0 to 1"),
        (["--moco-t", "0"], "--moco-t is 0.0, expected a temperature above 0"),
        (["--arch", "resnet19"], "resnet19"),
        (["--pipeline", "fast"], "fast"),
        (["--seed", "4294967296"], "--seed is 4294967296, expected a number from 0 to 4294967295"),
        (["--width", "0.3"], "--width is 0.3, expected a multiple of 0.125"),
        (["--limit", "0"], "--limit is 0, expected a number of images above 0"),
        (["--cos", "--schedule", "1"], "--cos and --schedule both define the learning rate"),
        (["--mlp", "--head", "8"], "--mlp and --head both define the projection head"),
        (["--resume", "--overwrite"], "--resume continues a run and --overwrite deletes it"),
        (["--warmup-epochs", "1"], "--warmup-epochs is 1, expected fewer than the 1 of --epochs"),
        (["--config"], "--config needs a value"),
        (["--config", "/nowhere/config.json"], "--config /nowhere/config.json cannot be read"),
        (["--batch-size", "24"], "--batch-size 24 is larger than the 16 images"),
        (["--moco-k", "17"], "--moco-k 17 is larger than the 16 images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_2(run, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "run"
    code, line = run("--out", out, *arguments)
    assert code == ExitCode.CONFIG
    assert message in line
    assert not out.exists() or [path.name for path in out.iterdir()] == [".lock"], "nothing was written"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train", "shapse"], "unknown recipe, data set or folder 'shapse'; did you mean 'shapes'"),
        (["recipes", "mnits"], "unknown recipe 'mnits'; did you mean 'mnist'"),
        (["recipes", "mnist", "now"], "fastmoco recipes takes at most one name, got 'mnist now'"),
    ],
)
def test_unknown_names_are_2_with_the_closest(capsys, argv: list[str], message: str) -> None:
    assert main(argv) == ExitCode.CONFIG
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {"moco_kk": 5}}', "the configuration has no field 'moco_kk'; did you mean 'moco_k'?"),
        ('{"modle": {}}', "the configuration has no group 'modle'; did you mean 'model'?"),
        ('{"model": {"moco_k": "5"}}', "--moco-k is '5', expected a whole number"),
        ('{"model": ', "the configuration is not valid JSON"),
        ('{"optim": {"lr": NaN}}', "the configuration contains NaN, expected finite numbers"),
        ("[1]", "the configuration is [1], expected a JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_bad_config_file_is_2(run, tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, line = run("--config", path, "--out", tmp_path / "run")
    assert code == ExitCode.CONFIG
    assert message in line
    assert f"--config {path}" in line


def test_flags_override_file_recipe_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(RunConfig().replace(moco_k=77, lr=0.5).to_json())
    assert parse_train([]) == RunConfig()
    assert parse_train(["cifar10-demo"]).model.moco_k == 4096
    config = parse_train(["cifar10-demo", "--config", str(path), "--lr", "0.25"])
    assert (config.model.moco_k, config.optim.lr, config.data.data) == (77, 0.25, ("shapes",))
    assert parse_train([f"--config={path}"]).model.moco_k == 77
    assert parse_train(["--schedule", "3", "5", "--no-tensorboard"]).optim.schedule == (3, 5)
    with pytest.raises(ConfigError):
        parse_train(["--schedule", "5", "3"])


def test_help_lists_the_commands_and_every_flag(capsys) -> None:
    assert main(["--help"]) == ExitCode.DONE
    assert "train [RECIPE] [DATA]" in capsys.readouterr().out
    assert main([]) == ExitCode.CONFIG
    capsys.readouterr()
    assert main(["train", "--help-all"]) == ExitCode.DONE
    text = capsys.readouterr().out.replace("--[no-]", "--")
    assert [name for name in RunConfig().flat() if "--" + name.replace("_", "-") not in text] == []


def test_recipes_are_listed_with_expected_accuracies(capsys) -> None:
    assert main(["recipes"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "cifar10-demo " in out
    assert "82.6" in out


# ---- data ------------------------------------------------------------------------------------------------------------


def test_missing_data_is_3(run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    (tmp_path / "noise.bin").write_bytes(bytes(100))
    for data, message in {
        tmp_path / "empty": "holds no images (no files)",
        tmp_path / "texts": "holds no images (1 file: 1 .txt)",
        tmp_path / "noise.bin": "is neither a folder nor a list",
        tmp_path / "texts" / "a.txt": "line 1 of",
        tmp_path / "nowhere": "does not exist; expected a folder, a list of paths or a name",
        Path("cifar11"): "did you mean cifar10",
    }.items():
        code, line = run("--data", data, "--out", tmp_path / "run")
        assert code == ExitCode.DATA
        assert message in line
    assert not (tmp_path / "run").exists()


def test_fewer_images_than_a_batch_is_2(run, tmp_path: Path) -> None:
    code, line = run("--data", fill(tmp_path / "few", "a.png", "b.png", "c.png"), "--out", tmp_path / "run")
    assert code == ExitCode.CONFIG
    assert "--batch-size 8 is larger than the 3 images: use 3 or less" in line


def test_a_bad_image_is_3_by_its_header(run, tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", *(f"{i}.png" for i in range(15)))
    (folder / "x.jpg").write_bytes(b"<html>")
    code, line = run("--data", folder, "--out", tmp_path / "run")
    assert code == ExitCode.DATA
    assert "x.jpg is not a usable image: it is an HTML page" in line
    assert not (tmp_path / "run").exists()
    code, out = run("--data", folder, "--out", tmp_path / "run", "--bad-images", "quarantine", "--moco-k", "15")
    assert code == ExitCode.DONE
    assert "x.jpg" in out


def test_a_bad_image_in_mid_training_is_3_and_training_resumes_once_it_is_fixed(run, tmp_path: Path) -> None:
    """Its header is valid, so only decoding in training detects it; earlier progress is kept."""
    folder = fill(tmp_path / "data", *(f"{i:02}.png" for i in range(16)))
    out, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    sizes = np.full((16, 2), (4, 3), dtype=np.int32)
    planner = Planner(sizes, seed=0, batch_size=8, augmentation=CIFAR, shuffle_keys=True)
    path = folder / f"{planner.indices(1)[0]:02}.png"  # first read in the second step
    flags = ["--data", folder, "--pipeline", "torch", "--workers", "0", "--checkpoint-every", "1", "--epochs", "2"]
    assert run(*flags, "--out", uninterrupted)[0] == ExitCode.DONE

    good = path.read_bytes()
    path.write_bytes(good[:-20] + bytes([good[-20] ^ 0xFF]) + good[-19:])  # breaks the checksum of its pixel data
    code, line = run(*flags, "--out", out)
    assert code == ExitCode.DATA
    assert f"{path.name} is not a usable image" in line
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 3, 1)
    assert path.name in status["message"]

    path.write_bytes(good)
    code, line = run(*flags, "--out", out, "--resume")
    assert code == ExitCode.DATA
    assert path.name in line
    assert "--allow-changed-data" in line
    code, output = run(*flags, "--out", out, "--resume", "--allow-changed-data")
    assert code == ExitCode.DONE
    assert "resumed at step 1 of 4" in output
    assert (out / "backbone.safetensors").read_bytes() == (uninterrupted / "backbone.safetensors").read_bytes()


# ---- the folder of the run -------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_2_and_is_unchanged(run, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"precious")
    for out in (tmp_path / "holiday", finished):
        before = snapshot(out)
        code, line = run("--out", out)
        assert code == ExitCode.CONFIG
        assert "is not empty: use --resume to continue, --overwrite to replace it, or --out" in line
        assert snapshot(out) == before
    code, line = run("--out", tmp_path / "holiday", "--overwrite")
    assert code == ExitCode.CONFIG
    assert "--overwrite will not delete" in line
    assert (tmp_path / "holiday" / "photo.jpg").read_bytes() == b"precious"
    code, line = run("--out", tmp_path / "holiday" / "photo.jpg")
    assert code == ExitCode.CONFIG
    assert "is a file, expected a folder" in line


def test_nothing_to_resume_is_2(run, tmp_path: Path) -> None:
    code, line = run("--out", tmp_path / "nowhere", "--resume")
    assert code == ExitCode.CONFIG
    assert "there is no run to resume in" in line
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--arch", "resnet34"], ["arch is 'resnet34' and was 'resnet18'"]),
        (["--moco-k", "8"], ["moco_k is 8 and was 16"]),
        (["--moco-k", "8", "--lr", "0.9"], ["moco_k is 8 and was 16", "lr is 0.9 and was"]),
        (["--width", "0.25"], ["width is 0.25 and was 0.125"]),
        (["--seed", "7"], ["seed is 7 and was 0"]),
        (["--limit", "20"], ["limit is 20 and was 16"]),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_resuming_as_another_run_is_4_and_names_the_fields(
    run, finished: Path, flags: list[str], messages: list[str]
) -> None:
    checkpoints = snapshot(finished / "checkpoints")
    code, line = run("--out", finished, "--resume", *flags)
    assert code == ExitCode.CHECKPOINT
    for message in messages:
        assert message in line
    assert snapshot(finished / "checkpoints") == checkpoints


def test_resuming_on_other_images_is_3(run, tmp_path: Path) -> None:
    folder, out = fill(tmp_path / "data", *(f"{i:02}.png" for i in range(16))), tmp_path / "run"
    assert run("--data", folder, "--out", out)[0] == ExitCode.DONE
    (folder / "03.png").rename(folder / "99.png")
    code, line = run("--data", folder, "--out", out, "--resume")
    assert code == ExitCode.DATA
    assert "--allow-changed-data" in line


def test_a_damaged_checkpoint_is_skipped_or_4(run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("--out", out)[0] == ExitCode.DONE
    older, newer = sorted((out / "checkpoints").glob("*.safetensors"))
    for path in (newer, older):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        code, output = run("--out", out, "--resume")
        if path == newer:
            assert code == ExitCode.DONE
            assert f"{newer.name} is damaged" in output
            assert "resumed at step 0 of 2" in output
            newer.write_bytes(bytes(10))
    assert code == ExitCode.CHECKPOINT
    assert "none of the 2 checkpoints" in output


def test_resuming_a_finished_run_changes_nothing(run, finished: Path) -> None:
    metrics, backbone = ((finished / name).read_bytes() for name in ("metrics.jsonl", "backbone.safetensors"))
    assert run("--out", finished, "--resume")[0] == ExitCode.DONE
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    assert (finished / "backbone.safetensors").read_bytes() == backbone


# ---- device and divergence -------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_6(run, tmp_path: Path) -> None:
    code, line = run("--device", "cuda", "--out", tmp_path / "run")
    assert code == ExitCode.DEVICE
    assert "--device cuda, but torch" in line
    assert "use --device cpu" in line
    assert not (tmp_path / "run").exists()


def test_divergence_is_5_and_leaves_a_clean_checkpoint(run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "run"
    code, line = run("--out", out, "--lr", "1e30", "--epochs", "9", "--max-skipped-steps", "3", "--log-every", "1")
    assert code == ExitCode.DIVERGED
    assert "lower --lr" in line
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    for path in (out / "checkpoints").glob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point()), path
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(record.get("skipped_steps", 0) for record in lines) >= 1
    assert any(record.get("loss", 0) is None for record in lines), "null, since NaN is not valid JSON"


def test_a_package_named_pipelines_in_the_current_folder_is_not_ours(tmp_path: Path) -> None:
    """`python -m` looks in the current folder first, and a project of one's own may have a package of that name."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    command = [sys.executable, "-m", "fastmoco", "scan", "absent"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.DATA, done.stderr[-2000:]
    assert done.stderr.startswith("fastmoco: error: ")


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastmoco.trainer.Trainer.run", lambda _: np.zeros(1)[2])
    with pytest.raises(IndexError):
        main(["train", *TINY, "--out", str(tmp_path / "run")])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch-size 24"):
        main(["train", *TINY, "--batch-size", "24", "--out", str(tmp_path / "run"), "--debug"])
