"""Checkpoints under faults: a full disk, SIGKILL during a save, corruption, and any sequence of these."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_checkpoint import assert_same, tensors_of

from fastmoco.errors import CheckpointError
from fastmoco.run.checkpoint import load, newest, prune, save, step_of, sweep, verify


def in_subprocess(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-c", f"import sys; sys.path.insert(0, {os.getcwd()!r})\n" + script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


FULL_DISK = """
import shutil, torch
from pathlib import Path
from fastmoco.run.checkpoint import CheckpointError, load, newest, save
folder = Path(sys.argv[1])
small, large = {"x": torch.ones(2**18)}, {"x": torch.ones(2**22)}  # 1 and 16 MiB on a disk of 8
first = save(folder, 1, small, {})
for usage in (shutil.disk_usage, lambda _: shutil._ntuple_diskusage(0, 0, 2**40)):  # known in advance; during the write
    shutil.disk_usage = usage
    try:
        save(folder, 2, large, {})
    except CheckpointError as error:
        print(error)
    assert newest(folder) == (first, []) and len(list(folder.iterdir())) == 2
save(folder, 2, small, {})
assert len(list(folder.iterdir())) == 4
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_and_no_partial_file(tmp_path: Path) -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs unshare -m, which this system does not permit")
    mount = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
    process = in_subprocess(FULL_DISK, str(tmp_path), prefix=("unshare", "-m", "sh", "-c", mount, str(tmp_path)))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    known, sudden = output.splitlines()
    assert "16777216" < known.split("needs ")[1].split()[0] < "16999999"
    assert "No space left" in sudden


FORK_SERVER = """
import os, torch
from itertools import count
from pathlib import Path
from fastmoco.run.checkpoint import newest, prune, save, step_of
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for _ in sys.stdin:
    if (pid := os.fork()) == 0:
        os.close(0)
        path, _ = newest(folder)
        start = step_of(path) + 1 if path else 0
        for step in range(start, start + 2000):
            save(folder, step, {"x": torch.full((200_000,), float(step))}, {"step": step})
            prune(folder, 2)
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_a_process_killed_during_a_save_always_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    server = in_subprocess(FORK_SERVER, str(tmp_path))
    assert server.stdin is not None
    assert server.stdout is not None
    last, swept = -1, 0
    try:
        for attempt in range(25):
            server.stdin.write("\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            deadline = time.monotonic() + 10
            while newest_step(tmp_path) <= last and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.0017 * attempt)  # at a different point of a save each time
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            path, warnings = newest(tmp_path)
            assert path is not None
            assert warnings == []
            tensors, meta = load(path, {"x": ((200_000,), torch.float32)})
            assert meta == {"step": step_of(path)}
            assert torch.equal(tensors["x"], torch.full((200_000,), float(meta["step"])))
            assert meta["step"] > last
            last = meta["step"]
            swept += len(sweep(tmp_path))
    finally:
        server.kill()
        server.communicate()
    assert swept > 0, "no kill happened during a save: the test proves nothing"


def newest_step(folder: Path) -> int:
    return max((step_of(path) for path in folder.glob("step-*.safetensors")), default=-1)


class Saves(RuleBasedStateMachine):
    """Saves, kills at every system call of a save, corruption and pruning in any order: the newest valid one loads."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="fastmoco-saves-"))
        self.folder = self.root / "now"
        self.folder.mkdir()
        self.step = 0
        self.intact: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(again=st.booleans())
    def save(self, again: bool) -> None:
        self.step += 0 if again else 1
        save(self.folder, self.step, tensors_of(self.step), {"step": self.step})
        self.intact.add(self.step)

    @rule(again=st.booleans(), call=st.integers(0, 8), torn=st.booleans())
    def killed_save(self, again: bool, call: int, torn: bool) -> None:
        """A SIGKILL leaves the folder as it was before the nth system call."""
        step = self.step if again else self.step + 1
        with frozen_before(call, self.folder, self.root / "frozen"):
            save(self.folder, step, tensors_of(step), {"step": step})
        if (self.root / "frozen").exists():
            shutil.rmtree(self.folder)
            (self.root / "frozen").rename(self.folder)
        for part in self.folder.glob("*.tmp"):
            if torn:
                os.truncate(part, part.stat().st_size // 2)
        path = self.folder / f"step-{step:09d}.safetensors"
        if path.exists() and not again:
            verify(path)  # it exists from the rename on
            self.intact.add(step)
        elif path.exists():
            with suppress(CheckpointError):  # either the corrupt file, or its replacement
                verify(path)
                self.intact.add(step)
        self.step = step

    @precondition(lambda self: len(self.intact) > 1)
    @rule(choice=st.randoms(use_true_random=False))
    def damage(self, choice: random.Random) -> None:
        step = choice.choice(sorted(self.intact))
        path = self.folder / f"step-{step:09d}.safetensors"
        content = bytearray(path.read_bytes())
        content[choice.randrange(len(content))] ^= 1
        path.write_bytes(content)
        self.intact.remove(step)

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        prune(self.folder, keep)
        self.intact = {step for step in self.intact if (self.folder / f"step-{step:09d}.safetensors").exists()}
        assert len(list(self.folder.glob("*.safetensors"))) <= keep + 1

    @rule()
    def sweep(self) -> None:
        sweep(self.folder)
        assert not list(self.folder.glob("*.tmp"))

    @invariant()
    def newest_is_the_newest_intact(self) -> None:
        if not self.intact:
            return
        path, _ = newest(self.folder)
        assert path is not None
        assert step_of(path) == max(self.intact)
        tensors, meta = load(path, tensors_of(0))
        assert meta == {"step": step_of(path)}
        assert_same(tensors, tensors_of(step_of(path)))


class frozen_before:  # noqa: N801 - used like a function
    """Copy `folder` to `frozen` just before the nth rename or flush."""

    def __init__(self, call: int, folder: Path, frozen: Path) -> None:
        self.remaining, self.folder, self.frozen = call, folder, frozen

    def __enter__(self) -> None:
        self.originals = os.replace, os.fsync
        os.replace, os.fsync = (self.wrapped(f) for f in self.originals)

    def __exit__(self, *_: object) -> None:
        os.replace, os.fsync = self.originals

    def wrapped(self, function):
        def call(*arguments):
            if self.remaining == 0:
                shutil.copytree(self.folder, self.frozen)
            self.remaining -= 1
            return function(*arguments)

        return call


TestSaves = Saves.TestCase
TestSaves.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
