"""The suite continues after failures, stops parts at their limits, skips what is done, and reports all of it."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tyro

from benchmarks import report, run_all
from benchmarks.measure import archives
from benchmarks.measure.suites import CPU, GPU, SUITES, Part
from benchmarks.run_all import Settings, find_images, main
from fastmoco.errors import ConfigError
from tests.benchmarks import sample_results as samples

ROOT = Path(__file__).resolve().parents[2]
WRITES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
runs = out.parent / "runs.txt"
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
(out / "fake.json").write_text(json.dumps({"benchmark": "fake", "environment": {}, "arguments": sys.argv[1:]}))
"""
FAILS = "import sys\nprint('fake.py: error: the disk is full')\nsys.exit(3)\n"
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(pathlib.Path(sys.argv[2]) / "pids").write_text(str(child.pid))
print("about to hang", flush=True)
time.sleep(60)
"""


def part(name: str, script: str = "writes.py", **more: Any) -> Part:
    return replace(Part(1, name, script, ("--out", "{out}"), 60.0), **more)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name, text in {"writes.py": WRITES, "fails.py": FAILS, "hangs.py": HANGS}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(suite="cpu", out=tmp_path / "out", data=(str(tmp_path),))


def record(settings: Settings, name: str) -> dict[str, Any]:
    assert settings.out is not None
    return json.loads((settings.out / name / "part.json").read_text())


def test_a_failure_is_recorded_and_the_other_parts_run(
    settings: Settings, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = main(settings, [part("bad", "fails.py"), part("good")], scripts)
    assert [r["state"] for r in records] == ["failed", "done"]
    bad = record(settings, "bad")
    assert (bad["exit_code"], bad["message"]) == (3, "fake.py: error: the disk is full")
    lines = [line for line in capsys.readouterr().out.splitlines() if "/2  " in line]
    assert "failed, exit code 3" in lines[0]
    assert "the disk is full" in lines[0]
    assert "log.txt" in lines[0]
    assert "done in" in lines[1]


def test_parts_that_are_done_are_skipped_and_failed_ones_are_repeated(settings: Settings, scripts: Path) -> None:
    parts = [part("good"), part("bad", "fails.py"), part("report", again=True)]
    main(settings, parts, scripts)
    (scripts / "fails.py").write_text(WRITES)
    records = main(settings, parts, scripts)
    assert [r["state"] for r in records] == ["done before", "done", "done"]
    assert settings.out is not None
    assert (settings.out / "runs.txt").read_text() == "xxxx"  # good once, bad once, report twice


def test_a_part_is_repeated_if_its_command_has_changed(settings: Settings, scripts: Path) -> None:
    main(settings, [part("good")], scripts)
    records = main(replace(settings, quick=True), [part("good")], scripts)
    assert records[0]["state"] == "done"
    assert "--quick" in record(settings, "good")["command"]


def test_a_part_is_stopped_at_its_limit_with_its_child_processes(settings: Settings, scripts: Path) -> None:
    began = time.monotonic()
    records = main(replace(settings, patience=0.02), [part("long", "hangs.py", limit_s=100.0), part("good")], scripts)
    assert [r["state"] for r in records] == ["timed out", "done"]
    assert record(settings, "long")["message"] == "about to hang"
    assert time.monotonic() - began < 25
    assert settings.out is not None
    assert _gone(int((settings.out / "long" / "pids").read_text()))


def _gone(pid: int) -> bool:
    """Whether a process ends within 5 s, possibly as a zombie."""
    try:
        process = psutil.Process(pid)
        for _ in range(50):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.1)
        process.kill()
    except psutil.NoSuchProcess:
        return True
    return False


def test_a_suite_that_is_stopped_stops_its_part_and_does_not_record_it_as_done(
    settings: Settings, scripts: Path
) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks import report, run_all
from tests.benchmarks.test_run_all import part
settings = run_all.Settings(suite="cpu", out=Path({str(settings.out)!r}), data=("/",))
with run_all.stoppable():
    run_all.main(settings, [part("long", "hangs.py")], Path({str(scripts)!r}))
"""
    assert settings.out is not None
    pids = settings.out / "long" / "pids"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert _gone(int(pids.read_text()))
    assert not (settings.out / "long" / "part.json").exists()


def test_a_part_without_its_images_or_its_input_is_skipped_with_a_reason(
    settings: Settings, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [part("needs-images", needs="cifar10"), part("needs-step", after="step"), part("good")]
    records = main(settings, parts, scripts)
    assert [r["state"] for r in records] == ["skipped", "skipped", "done"]
    out = capsys.readouterr().out
    assert "skipped: no cifar10 in --data" in out
    assert "skipped: there is no result of step" in out


def test_missing_libraries_are_reported_with_the_command_that_installs_them(
    settings: Settings, scripts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_all, "_installed", lambda module: False)
    main(settings, [part("good")], scripts)
    out = capsys.readouterr().out
    assert all(f"uv sync --inexact {flags}" in out for flags in ("--extra dali", "--extra ffcv", "--group bench"))


def test_quick_runs_without_data_on_generated_images(
    settings: Settings, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(run_all.DEFAULT_DATA, raising=False)
    wanted = part("good", arguments=("--data", "{data}", "--side", "8", "--out", "{out}"), needs="cifar10")
    assert main(replace(settings, quick=True, data=()), [wanted], scripts)[0]["state"] == "done"
    assert settings.out is not None
    result = json.loads((settings.out / "good" / "fake.json").read_text())
    assert result["arguments"] == ["--side", "8", "--out", str(settings.out / "good"), "--quick"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"part": 99}, "--part 99 does not exist in cpu")],
)
def test_invalid_settings_are_refused(
    settings: Settings, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(run_all.DEFAULT_DATA, raising=False)
    with pytest.raises(ConfigError, match=message):
        main(replace(settings, **change))


def test_without_images_parts_run_on_generated_ones_or_are_skipped(
    settings: Settings, scripts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(run_all.DEFAULT_DATA, raising=False)
    wanted = part("good", arguments=("--data", "{data}", "--out", "{out}"), needs="cifar10")
    real = replace(wanted, name="accuracy", generated=False)
    records = main(replace(settings, data=()), [wanted, real], scripts)
    assert [r["state"] for r in records] == ["done", "skipped"]
    assert settings.out is not None
    result = json.loads((settings.out / "good" / "fake.json").read_text())
    assert result["arguments"] == ["--out", str(settings.out / "good")]
    out = capsys.readouterr().out
    assert "no images: generated ones are used" in out
    assert "skipped: no cifar10 are given with --data" in out


def test_results_of_each_commit_have_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all, "git_commit", lambda: "0123456789+")
    assert run_all.default_folder(Settings(suite="gpu")) == Path("runs/benchmarks/gpu-0123456+")
    monkeypatch.setattr(run_all, "git_commit", lambda: None)
    assert run_all.default_folder(Settings(suite="cpu", quick=True)) == Path("runs/benchmarks/cpu-quick")


def test_scripts_find_their_packages_where_fastmoco_is_not_installed(settings: Settings, scripts: Path) -> None:
    (scripts / "imports.py").write_text(f"import sys\nassert {str(ROOT)!r} in sys.path\n")
    assert main(settings, [part("good", "imports.py")], scripts)[0]["state"] == "done"


def test_the_rounds_of_a_part_that_is_stopped_are_named_and_reported(
    settings: Settings, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = samples.step() | {"complete": False, "rounds": 2, "planned_rounds": 5}
    (scripts / "result.json").write_text(json.dumps(result))
    copies = "import pathlib, shutil, sys\nshutil.copy(pathlib.Path(__file__).with_name('result.json'), "
    (scripts / "stops.py").write_text(copies + "sys.argv[2] + '/step-cifar.json')\n" + FAILS)
    records = main(settings, [part("step", "stops.py")], scripts)
    assert records[0]["state"] == "failed"
    assert records[0]["kept"] == ["2 of 5 rounds of step-cifar"]
    assert "kept 2 of 5 rounds of step-cifar" in capsys.readouterr().out
    assert settings.out is not None
    text = report.main(report.Settings(results=settings.out))[0].read_text(encoding="utf-8")
    assert "the disk is full; kept 2 of 5 rounds of step-cifar" in text
    assert "**Stopped after 2 of 5 rounds.**" in text
    assert "`trainstep`: **60.0 images/s**" in text


def test_images_are_found_by_name_in_folders_and_tar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all, "unpacked", lambda data: archives.unpacked(data, tmp_path / "cache"))
    for name in ("all/imagenet-60", "imagenette", "train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "a.txt").write_text("an image")
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "train", "train")
        archive.add(tmp_path / "train", "test")
    data = [str(tmp_path / name) for name in ("all", "imagenette", "cifar10-jpeg.tar.xz")]
    assert find_images("imagenet-60", data) == data[0] + "/imagenet-60"
    assert find_images("imagenette", data) == data[1]
    folder = find_images("cifar10", data)
    assert folder is not None
    assert (Path(folder) / "test" / "a.txt").read_text() == "an image"
    assert find_images("stl10", data) is None
    (tmp_path / "cifar100").mkdir()
    assert find_images("cifar10", [str(tmp_path / "cifar100"), str(tmp_path / "cifar100.tar.xz")]) is None


def test_the_parts_are_listed_with_their_limits(capsys: pytest.CaptureFixture[str]) -> None:
    main(Settings(suite="gpu", list=True))
    out = capsys.readouterr().out
    assert "part 1, at most 520 s" in out
    assert all(entry.name in out for entry in GPU)


def test_the_suite_of_a_gpu_is_refused_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--suite gpu needs a CUDA device.*: use --suite cpu"):
        main(Settings(suite="gpu", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists(), "nothing was started"


def test_the_limits_of_the_suites_are_those_in_the_documentation() -> None:
    assert sum(entry.limit_s for entry in CPU) <= 20 * 60
    for number in {entry.number for entry in GPU}:
        assert sum(entry.limit_s for entry in GPU if entry.number == number) <= 9 * 60
    for parts in SUITES.values():
        assert len({entry.name for entry in parts}) == len(parts)
        assert parts[-1].name == "report"


@pytest.mark.parametrize("script", sorted({entry.script for entry in (*CPU, *GPU)}))
def test_every_script_accepts_the_flags_of_the_suites(script: str) -> None:
    settings = importlib.import_module(f"benchmarks.{script.removesuffix('.py')}").Settings
    for entry in (*CPU, *GPU):
        if entry.script == script:
            assert tyro.cli(settings, args=[*entry.arguments], console_outputs=False)
            quick = tyro.cli(settings, args=[*entry.arguments, *entry.quick], console_outputs=False)
            assert quick.quick if entry.quick else not hasattr(quick, "quick")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_parts_run_in_separate_processes_and_end_in_a_report(tmp_path: Path) -> None:
    """The scripts have their own tests, so the two cheapest parts are enough."""
    chosen = [entry for entry in CPU if entry.name in ("roofline", "report")]
    chosen[0] = replace(chosen[0], arguments=("--out", "{out}"), after=None)
    settings = Settings(suite="cpu", quick=True, out=tmp_path, patience=5.0)
    records = main(settings, chosen)
    assert [r["state"] for r in records] == ["done"] * 2, records
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Measured with --quick" in report
    assert "FLOP/byte" in report
