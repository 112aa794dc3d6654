"""Training on the CPU of macOS and Windows: simulated on Linux by what Python lacks there."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastmoco.console import shown_path
from pipelines import platforms
from pipelines.data.files import _order

ROOT = Path(__file__).parents[1]
SYSTEMS = ["macos", "windows"]

COMMANDS = """
import sys
from pathlib import Path
from fastmoco.cli import main
from fastmoco.errors import ConfigError
from fastmoco.run.directory import RunDirectory
from tests.run.test_train import RESIDENT
from tools.make_ffcv import main as make_ffcv
from tools.make_shards import main as make_shards

def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0, arguments

if __name__ == "__main__":
    folder, images, system = Path(sys.argv[1]), Path(sys.argv[1]) / "images", sys.argv[2]
    out, data = folder / "run", ["--data-root", folder / "data"]
    run("--help")
    run("recipes")
    run("scan", images, "--workers", 0, *data)
    run("views", images, "--crop-size", 8, "--device", "cpu", "--out", folder / "views.png", *data)
    train = ["train", *RESIDENT, "--data", images, "--no-tensorboard", "--bad-images", "quarantine"]
    run(*train, "--out", out, *data)
    weights = (out / "backbone.safetensors").read_bytes()
    max((out / "checkpoints").glob("*.safetensors")).unlink()
    run(*train, "--out", out, "--resume", *data)
    assert (out / "backbone.safetensors").read_bytes() == weights
    run("eval", out, "--probes", "knn", "--device", "cpu", *data)
    run("export", out, "--to", "safetensors", "--out", folder / "exported.safetensors")
    run("sweep", *train[1:], "--vary", "moco-m=0.9", "--out", folder / "sweep", *data)
    assert make_shards([str(images), str(folder / "shards")]) == 0
    assert make_ffcv([str(images), str(folder / "images.beton")]) == 0
    assert main(["train", "--data", str(images), "--device", "mps"]) == 2
    if system == "windows":
        opened = RunDirectory.open(out, resume=True)
        try:
            RunDirectory.open(out, resume=True)
        except ConfigError as error:
            assert "another process is using" in str(error)
        else:
            raise AssertionError("opened twice")
        opened.close()
        RunDirectory.open(out, resume=True).close()
    print("all commands ran")
"""

DOCTOR = """
from fastmoco.cli import main

if __name__ == "__main__":
    assert main(["doctor", "--only", "machine", "--device", "cpu"]) == 0
    print("nothing fails")
"""

WORKERS = """
import multiprocessing
import sys
import numpy as np
import torch
from pipelines.backends.torch import TorchCrops
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import eval_plans

if __name__ == "__main__":
    assert ("forkserver" in multiprocessing.get_all_start_methods()) == (sys.argv[2] == "macos")
    index = ImageIndex.from_pixels("x", np.random.default_rng(0).integers(0, 256, (70, 9, 8, 3), dtype=np.uint8))
    plans = list(eval_plans(index.sizes, np.arange(70), 35, 4))
    here, there = (
        [crops.images.clone() for crops in TorchCrops(index, 4, torch.device("cpu"), workers).crops(plans)]
        for workers in (0, 1)
    )
    assert len(here) == 2
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    print(len(there), "batches are equal")
"""


def run_on(system: str, script: str, folder: Path) -> str:
    """The last line printed by a script in a process that has only what Python has on that system, as its children."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import tests.other_platform\n")
    program = site / "program.py"
    program.write_text(script)
    environment = os.environ | {
        "SIMULATED_PLATFORM": system,
        "SIMULATED_MEMORY": str(site),
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(program), str(folder), system]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_command_runs_on_the_cpu(system: str, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(40):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((12 + i, 20), 40.0 + i).convert("RGB").save(folder / f"{i:02}.png")
    assert run_on(system, COMMANDS, tmp_path) == "all commands ran"
    written = ["views.png", "exported.safetensors", "run/backbone.safetensors", "run/eval/eval.json"]
    written += ["sweep/sweep.json", "images.beton", "images.beton.json"]
    assert [name for name in written if not (tmp_path / name).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_doctor_finds_no_fault(system: str, tmp_path: Path) -> None:
    assert run_on(system, DOCTOR, tmp_path) == "nothing fails"


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_workers_share_memory(system: str, tmp_path: Path) -> None:
    assert run_on(system, WORKERS, tmp_path) == "2 batches are equal"


def test_cpus_and_memory_are_counted_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= platforms.usable_cpus() <= (os.cpu_count() or 1)
    free = platforms.free_host_memory_bytes()
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    assert 0 < free < page * pages
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert platforms.usable_cpus() == os.cpu_count()

    def sysconf(name: str) -> int:
        return {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": page}.get(name) or int("unrecognised name")

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert platforms.free_host_memory_bytes() == page * pages


def test_reads_and_writes_at_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for _ in range(2):
        path.write_bytes(b"0123456789")
        descriptor = os.open(path, os.O_RDWR)
        assert platforms.write_at(descriptor, b"ab", 4) == 2
        assert platforms.read_at(descriptor, 4, 3) == b"3ab6"
        assert platforms.read_at(descriptor, 4, 8) == b"89"
        os.close(descriptor)
        monkeypatch.delattr(os, "pread", raising=False)
        monkeypatch.delattr(os, "pwrite", raising=False)


def test_a_folder_is_synced_where_it_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    (tmp_path / "file").write_text("x")
    platforms.sync(tmp_path / "file")
    platforms.sync(tmp_path)
    assert len(synced) == 2
    monkeypatch.delattr(os, "O_DIRECTORY")
    platforms.sync(tmp_path)
    assert len(synced) == 2


def test_a_lock_keeps_others_out_until_the_file_is_closed(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    platforms.lock(first, wait=False)
    with pytest.raises(OSError, match=r"temporarily unavailable"):
        platforms.lock(second, wait=False)
    locked = threading.Event()
    waiting = threading.Thread(target=lambda: (platforms.lock(second, wait=True), locked.set()))
    waiting.start()
    assert not locked.is_set()
    os.close(first)
    waiting.join(60)
    assert locked.is_set()
    os.close(second)


def test_processes_start_clean_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platforms.clean_context([]).get_start_method() == "forkserver"
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert platforms.clean_context([]).get_start_method() == "spawn"


def test_files_have_the_same_order_on_windows() -> None:
    names = ["aB/x.png", "a/x.png", "a/b/x.png", "a-b/x.png"]
    there = [name.replace("/", "\\") for name in names]
    ordered = [name.replace("\\", "/") for name in sorted(there, key=lambda name: _order(name, "\\"))]
    assert ordered == sorted(names, key=_order) == sorted(names, key=os.fsencode)


def test_a_path_on_another_drive_is_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_path(Path.cwd() / "runs") == "runs"

    def relpath(path: Path) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert shown_path("runs") == str(Path.cwd() / "runs")
