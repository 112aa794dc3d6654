"""Resumed runs of the same effect: more epochs, images elsewhere, other pipelines, new folders; and their weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.commands.train_arguments import parse_train
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.step.schedules import Rates
from tests.oddities import encode, picture
from tests.run.test_train import RESIDENT, assert_same_run, exact_metrics, newest, trained
from tools.make_shards import main as make_shards

FLAGS = ["--knn-every", "0", "--no-tensorboard", "--cpu-threads", "1", "--check", "off", "--log-every", "1"]
QUICK = [*RESIDENT, *FLAGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`: 32 JPEGs in two classes; `whole`: two epochs on them; `half`: the same, stopped after step 4."""
    folder = tmp_path_factory.mktemp("folder")
    for i in range(32):
        path = folder / "photos" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.roll(picture(20, 20), i, axis=1), "JPEG", quality=90))
    out = trained(folder / "whole", "--data", folder / "photos", "--checkpoint-every", "4", settings=QUICK)
    shutil.copytree(out, folder / "half")
    cut(folder / "half")
    return folder


def cut(run: Path) -> None:
    """As if the run had been killed after step 4."""
    for path in (run / "checkpoints").glob("step-000000008*"):
        path.unlink()
    (run / "backbone.safetensors").unlink()
    (run / "status.json").write_text((run / "status.json").read_text().replace('"done"', '"running"'))


@pytest.fixture
def half(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "half", tmp_path / "half"))


def resume(run: Path, *flags: str | Path) -> int:
    return main(["train", "--resume", "--out", str(run), *map(str, flags)])


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in exact_metrics(run) if "loss" in record]


def config(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["relative", "./relative", "link", "copy", "labels apart"])
def test_the_same_images_under_another_path_go_on(
    how: str,
    folder: Path,
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weights are those of the run that was not stopped, bit for bit, and the new path is absolute."""
    monkeypatch.chdir(folder)
    data = {"relative": "photos", "./relative": "./photos"}.get(how, str(tmp_path / "other"))
    if how == "link":
        (tmp_path / "other").symlink_to(folder / "photos")
    elif how == "copy":
        shutil.copytree(folder / "photos", tmp_path / "other", copy_function=shutil.copy)  # with new times
    elif how == "labels apart":
        data = str(tmp_path / "list.txt")
        Path(data).write_text("".join(f"{path}\n" for path in sorted((folder / "photos").glob("*/*.jpg"))))
    assert resume(half, "--data", data) == ExitCode.DONE
    assert_same_run(half, folder / "whole")
    assert config(half)["data"]["data"] == [os.path.abspath(data)]
    moved = "the same images, now in" in " ".join(capsys.readouterr().out.split())
    assert moved == (how not in ("relative", "./relative"))


def test_a_run_of_a_relative_path_resumes_from_any_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run = trained(tmp_path / "run", "--data", "photos", "--checkpoint-every", "4", settings=QUICK)
    cut(run)
    monkeypatch.chdir("/")
    assert resume(run) == ExitCode.DONE
    assert_same_run(run, folder / "whole")


def test_a_run_whose_config_has_a_relative_path_resumes_from_its_folder(
    folder: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of version 0.1.0 have."""
    text = (half / "config.json").read_text()
    (half / "config.json").write_text(text.replace(str(folder / "photos"), "photos"))
    monkeypatch.chdir(folder)
    assert resume(half) == ExitCode.DONE


def test_archives_of_the_same_images_go_on(
    folder: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they contain is compared; archives of other images are refused."""
    assert make_shards([str(folder / "photos"), str(tmp_path / "shards")]) == 0
    assert resume(half, "--data", tmp_path / "shards") == ExitCode.DONE
    assert_same_run(half, folder / "whole")
    said = " ".join(capsys.readouterr().out.split())
    assert "the images are in tar archives and were in files: their sizes and a sample of their contents" in said

    shutil.copytree(folder / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "a" / "04.jpg").write_bytes(encode(255 - picture(20, 20), "JPEG", quality=90))
    assert make_shards([str(tmp_path / "photos"), str(tmp_path / "others")]) == 0
    assert resume(half, "--data", tmp_path / "others") == ExitCode.DATA
    assert resume(half, "--data", tmp_path / "photos") == ExitCode.DATA
    assert "with other bytes" in capsys.readouterr().err


# ---- pipelines and devices -------------------------------------------------------------------------------------------


def test_another_pipeline_of_the_same_views_goes_on(
    folder: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(half, "--pipeline", "torch", "--workers", "0") == ExitCode.DONE
    assert "the same views, now by --pipeline torch" in " ".join(capsys.readouterr().out.split())
    losses, expected = (losses_of(run) for run in (half, folder / "whole"))
    assert losses[:4] == expected[:4]
    assert losses[4:] != expected[4:], "crops are rounded differently"
    state, wanted = newest(half), newest(folder / "whole")
    for name in (name for name in wanted if name.startswith("model/query.") and name.endswith("weight")):
        torch.testing.assert_close(state[name], wanted[name], rtol=0, atol=0.05)
    assert resume(half, "--pipeline", "dataloader") == ExitCode.CHECKPOINT
    assert "pipeline is 'dataloader' and was 'torch'" in capsys.readouterr().err


def test_a_run_of_a_gpu_goes_on_without_one(folder: Path, half: Path) -> None:
    """Its kernels, CUDA graph and prefetching are chosen again."""
    settings = config(half)
    settings["run"] |= {"cuda_graph": "on", "prefetch": "on", "kernels": "triton", "compile": "default"}
    (half / "config.json").write_text(json.dumps(settings))
    assert resume(half) == ExitCode.DONE
    assert [config(half)["run"][name] for name in ("cuda_graph", "prefetch", "kernels", "compile")] == [
        *("off", "off", "torch", "off"),
    ]
    assert_same_run(half, folder / "whole")


def test_the_precision_changes_if_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also to and from float16, whose loss scale is part of the state."""
    run = trained(tmp_path / "run", "--epochs", "1", "--amp", "fp16", settings=QUICK)
    assert resume(run, "--epochs", "2", "--amp", "fp32") == ExitCode.CHECKPOINT
    assert "amp is 'fp32' and was 'fp16'" in capsys.readouterr().err
    assert resume(run, "--epochs", "2", "--amp", "fp32", "--allow-changed", "amp") == ExitCode.DONE
    assert "step/scaler/scale" not in newest(run)
    assert resume(run, "--epochs", "3", "--amp", "fp16", "--allow-changed", "amp") == ExitCode.DONE
    assert "step/scaler/scale" in newest(run)


# ---- more epochs -----------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_for_more_epochs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cosine is planned over all of them, which is said; the folder is that of the longer run from then on."""
    run = Path(shutil.copytree(folder / "whole", tmp_path / "run"))
    assert resume(run) == ExitCode.DONE
    assert "all 2 epochs are done: more --epochs go on from here" in " ".join(capsys.readouterr().out.split())
    assert resume(run, "--epochs", "3") == ExitCode.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "extended from 2 to 3 epochs: the learning rate at step 8 is 0.0002344 (was 0.0004687)" in said
    assert [record["step"] for record in exact_metrics(run) if "loss" in record] == list(range(1, 13))
    assert exact_metrics(run)[: len(exact_metrics(folder / "whole"))] == exact_metrics(folder / "whole")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["epoch"]) == ("done", 12, 3)
    assert config(run)["optim"]["epochs"] == 3
    backbone = (run / "backbone.safetensors").read_bytes()
    assert backbone != (folder / "whole" / "backbone.safetensors").read_bytes()

    original = Rates.lr
    monkeypatch.setattr(Rates, "lr", lambda self, step: 1e25 if step >= 12 else original(self, step))
    assert resume(run, "--epochs", "4") == ExitCode.DIVERGED
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert (run / "backbone.safetensors").read_bytes() == backbone


def test_a_run_that_was_extended_and_stopped_keeps_its_new_end(folder: Path, half: Path, tmp_path: Path) -> None:
    """--resume alone goes on to the epochs that were given last."""
    assert resume(half, "--epochs", "3", "--checkpoint-every", "4") == ExitCode.DONE
    expected = Path(shutil.copytree(half, tmp_path / "expected"))
    for path in (half / "checkpoints").glob("step-000000012*"):
        path.unlink()
    assert resume(half) == ExitCode.DONE
    assert_same_run(half, expected)


def test_given_milestones_make_an_extended_run_equal_one_planned_so(tmp_path: Path) -> None:
    """Bit for bit; while milestones of the plan move with the number of epochs."""
    given = ["--schedule", "1", "3"]
    whole = trained(tmp_path / "whole", "--epochs", "4", *given, settings=QUICK)
    run = trained(tmp_path / "run", "--epochs", "2", *given, settings=QUICK)
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    assert resume(run, "--epochs", "4", *given) == ExitCode.DONE
    assert_same_run(run, whole)
    assert resume(moved, "--epochs", "4") == ExitCode.DONE
    assert config(moved)["optim"]["schedule"] == [2, 4] or config(moved)["optim"]["schedule"] == [2, 6]


# ---- from a path -----------------------------------------------------------------------------------------------------


def test_resume_takes_the_path_of_a_run_or_of_its_newest_checkpoint(folder: Path, half: Path) -> None:
    checkpoint = half / "checkpoints" / "step-000000004.safetensors"
    for path in (half, checkpoint):
        for flags in (["--resume", str(path)], [f"--resume={path}"], ["--resume", str(path), "--out", str(half)]):
            parsed = parse_train(flags)
            assert (parsed.run.resume, parsed.run.out, parsed.run.resume_from) == (True, str(half), None)
            assert parsed.optim.batch_size == 8
    assert main(["train", "--resume", str(checkpoint), "--epochs", "2"]) == ExitCode.DONE
    assert_same_run(half, folder / "whole")


def test_an_older_checkpoint_goes_on_in_a_new_run_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run would lose the later steps."""
    older = folder / "whole" / "checkpoints" / "step-000000004.safetensors"
    with pytest.raises(ConfigError, match=r"is not the newest checkpoint of .*, whose later steps would be lost"):
        parse_train(["--resume", str(older)])
    before = {path: path.read_bytes() for path in (folder / "whole").rglob("*") if path.is_file()}
    run = tmp_path / "run"
    assert main(["train", "--resume", str(older), "--out", str(run)]) == ExitCode.DONE
    assert "goes on at step 4 of 8 from " in capsys.readouterr().out
    state, expected = newest(run), newest(folder / "whole")
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, state[name])] == []
    steps = [record["step"] for record in exact_metrics(run) if "loss" in record]
    assert steps == [5, 6, 7, 8]
    assert config(run)["run"]["resume_from"] == str(older)
    assert before == {path: path.read_bytes() for path in (folder / "whole").rglob("*") if path.is_file()}

    assert resume(run, "--epochs", "3") == ExitCode.DONE  # its own newest checkpoint
    assert [record["step"] for record in exact_metrics(run) if "loss" in record] == list(range(5, 13))
    assert config(run)["run"]["resume_from"] == str(older)


def test_a_checkpoint_alone_says_what_it_was_trained_with(folder: Path, tmp_path: Path) -> None:
    """Copied out of its run, with its hash."""
    for suffix in ("", ".sha256"):
        source = folder / "whole" / "checkpoints" / f"step-000000004.safetensors{suffix}"
        shutil.copy(source, tmp_path)
    flags = ["--resume-from", str(tmp_path / "step-000000004.safetensors"), "--out", str(tmp_path / "run")]
    assert main(["train", *flags]) == ExitCode.DONE
    assert torch.equal(newest(tmp_path / "run")["queue/keys"], newest(folder / "whole")["queue/keys"])


@pytest.mark.parametrize("flag", ["--resume", "--resume-from"])
def test_a_file_of_another_trainer_is_answered_with_the_flag_for_its_weights(flag: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"state_dict": {"x": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match=r"use --init .*checkpoint_0199.pth.tar to start a new run"):
        parse_train([flag, str(path)])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "does not say what it was trained with"),
        (b"\x20" + bytes(7) + b'{"__metadata__": {"meta": "[]"}}', "does not say what it was trained with"),
        (b"\xff" * 40, "does not say what it was trained with"),
    ],
)
def test_what_is_no_run_and_no_checkpoint_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "step.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ConfigError, CheckpointError), match=words) as caught:
        parse_train(["--resume", str(path)])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        parse_train(["--resume", str(tmp_path)])


def test_a_new_run_never_replaces_the_one_it_goes_on_from(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--resume-from", str(half), "--out", str(half), "--overwrite"]
    assert main(["train", *flags]) == ExitCode.CONFIG
    assert "use --resume to go on in it, or another --out" in capsys.readouterr().err
    assert (half / "checkpoints" / "step-000000004.safetensors").exists()
