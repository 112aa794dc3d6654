"""The folder of a run: rejected paths, protection from deletion, and the status for other programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmoco.config import RunConfig
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.run import checkpoint
from fastmoco.run.directory import RunDirectory, read_config, read_status
from fastmoco.run.environment import git_commit, versions
from fastmoco.run.folder_names import default_run_name


def a_run(path: Path) -> Path:
    run = RunDirectory.open(path)
    run.write_config(RunConfig())
    run.write_status(step=1, epoch=0)
    checkpoint.save(run.checkpoints, 1, {"x": torch.ones(1)}, {})
    run.close()
    return path


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_new_run_gets_a_new_folder(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "runs" / "first")
    config = RunConfig().replace(seed=3)
    run.write_config(config)
    assert read_config(run.path) == config
    run.close()


def test_a_folder_with_content_needs_a_flag(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--resume .* --overwrite"):
        RunDirectory.open(run)
    RunDirectory.open(run, resume=True).close()
    assert {"config.json", "status.json", "checkpoints"} <= names(run)


def test_a_run_that_failed_before_it_wrote_anything_can_be_repeated(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path / "run").close()
    repeated = RunDirectory.open(tmp_path / "run")
    assert repeated.path == tmp_path / "run"
    assert names(repeated.path) == {".lock"}
    repeated.close()


def test_overwrite_empties_the_folder_of_a_run(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    run = a_run(tmp_path / "run")
    (run / "tb").symlink_to(elsewhere)
    (run / "curves.png").symlink_to(elsewhere / "precious")
    (run / "views.png.0123abcd.tmp").write_text("")
    (run / "eval").mkdir()
    (run / "eval" / "confusion-few-label.png").write_text("")
    RunDirectory.open(run, overwrite=True).close()
    assert names(run) == {".lock"}
    assert names(elsewhere) == {"precious"}


@pytest.mark.parametrize("content", ['{"model_type": "resnet", "architectures": []}', "{}", "[]", "", "\udcff"])
def test_overwrite_never_deletes_other_folders(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="will not delete"):
        RunDirectory.open(tmp_path, overwrite=True)
    assert {"config.json", "thesis.tex"} <= names(tmp_path)


def test_overwrite_never_deletes_through_a_link_or_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ConfigError, match="symbolic link"):
        RunDirectory.open(tmp_path / "link", overwrite=True)
    monkeypatch.chdir(run / "checkpoints")
    with pytest.raises(ConfigError, match="current or home folder"):
        RunDirectory.open(run, overwrite=True)
    assert "status.json" in names(run)


def test_resume_without_a_run_or_a_checkpoint_does_not_start_from_scratch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        RunDirectory.open(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()
    run = RunDirectory.open(tmp_path / "run")
    run.write_config(RunConfig())
    run.close()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        RunDirectory.open(run.path, resume=True)


def test_an_unusable_path_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError) as caught:
            RunDirectory.open(path)
        assert "--out" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    run = a_run(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process"):
            RunDirectory.open(run, overwrite=True)
        assert "status.json" in names(run)
        other.communicate(b"\n")
    RunDirectory.open(run, overwrite=True).close()


def test_status_records_how_a_run_ended_and_its_versions(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    ends = {None: "running", ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted", ExitCode.DIVERGED: "failed"}
    status = {}
    for exit_code, state in ends.items():
        run.write_status(step=12, epoch=3, exit_code=exit_code, message="é\udcff")
        status = read_status(tmp_path)
        assert (status["state"], status["exit_code"], status["step"], status["epoch"]) == (state, exit_code, 12, 3)
    assert status["message"] == "é\udcff"
    assert status["versions"]["torch"] == torch.__version__.split("+")[0] == versions()["torch"]
    assert status["git_commit"] == git_commit()
    assert not list(tmp_path.glob("*.tmp"))
    run.close()


@pytest.mark.parametrize("text", ["", "[]", '{"state": "done"}'])
def test_a_status_of_another_program_is_rejected(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="readable status"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ConfigError, match=r"status\.json"):
        read_status(tmp_path)


def test_the_default_name_is_a_valid_file_name() -> None:
    config = RunConfig().replace(data="/photos/My holiday (é)", arch="resnet18", epochs=200)
    assert default_run_name(config) == "My-holiday-resnet18-200ep-seed0"
    for data in ("/", "..", "~", "é", "a" * 500, "x/../../etc"):
        name = default_run_name(RunConfig().replace(data=data))
        assert name == os.path.basename(name)
        assert not name.startswith((".", "-"))
        assert len(name) < 60
