"""Training, saving, kills, damage, full disks, pruning and resuming, in any order."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from fastmoco.errors import CheckpointError
from fastmoco.run import checkpoint
from fastmoco.run.checkpoint_writer import CheckpointWriter
from pipelines.files import sidecar

KEEP = 2


def advanced(state: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """One step of a training that never repeats itself, in float32: every bit depends on all steps before."""
    generator = torch.Generator().manual_seed(step)
    momentum = 0.9 * state["momentum"] + torch.randn(3, 4, generator=generator)
    return {"weight": state["weight"] - 0.1 * momentum, "momentum": momentum}


@cache
def state_at(step: int) -> dict[str, Tensor]:
    """The state of the uninterrupted training."""
    if step == 0:
        return {"weight": torch.ones(3, 4), "momentum": torch.zeros(3, 4)}
    return advanced(state_at(step - 1), step)


@contextmanager
def at_call(number: int, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` before the nth rename or flush, counted from 0, and before each later one."""
    originals, calls = (os.replace, os.fsync), itertools.count()

    def wrapped(function):
        def call(*arguments):
            if next(calls) >= number:
                action()
            return function(*arguments)

        return call

    os.replace, os.fsync = map(wrapped, originals)
    try:
        yield
    finally:
        os.replace, os.fsync = originals


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Runs(RuleBasedStateMachine):
    """A run whose process and disk may fail at any time.

    intact    steps of the checkpoints that must verify
    happened  what any of these runs has met
    """

    happened: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="fastmoco-runs-"))
        self.folder = self.root / "now"
        self.intact: set[int] = set()
        self.start(0, state_at(0))
        self.save()

    def teardown(self) -> None:
        self.writer.close()
        shutil.rmtree(self.root)

    def start(self, step: int, state: dict[str, Tensor]) -> None:
        """A new process."""
        self.step, self.state = step, state
        self.writer = CheckpointWriter(self.folder, KEEP)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.safetensors"

    def write(self) -> None:
        self.writer.start(self.step, self.state, {"step": self.step}, lambda: None, last_chance=True)
        self.writer.wait()

    @rule(steps=st.integers(1, 3))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.state = advanced(self.state, self.step)

    @rule()
    def save(self) -> None:
        self.write()
        self.intact = {step for step in {*self.intact, self.step} if self.path(step).exists()}
        assert self.step in self.intact

    @rule(call=st.integers(0, 4))
    def save_on_a_full_disk(self, call: int) -> None:
        """The save fails, or it was complete before: what was there stays, and nothing partial does."""
        self.happened.add("full disk")
        before = set(self.intact)
        with at_call(call, disk_is_full), suppress(CheckpointError):
            self.write()
        self.intact = {step for step in before if self.path(step).exists()}
        if self.path(self.step).exists():
            with suppress(CheckpointError):  # a corrupt file may have been there
                checkpoint.verify(self.path(self.step))
                self.intact.add(self.step)
        assert {step for step in before if step >= max(before)} <= self.intact
        assert not list(self.folder.glob("*.tmp"))

    @rule(call=st.integers(0, 8), torn=st.booleans())
    def killed_while_saving(self, call: int, torn: bool) -> None:
        """A SIGKILL leaves the folder as it was before the nth rename or flush."""
        self.happened.add("kill")
        frozen = self.root / "frozen"

        def freeze() -> None:
            if not frozen.exists():
                shutil.copytree(self.folder, frozen)

        with at_call(call, freeze):
            self.write()
        if frozen.exists():
            shutil.rmtree(self.folder)
            frozen.rename(self.folder)
        for part in self.folder.glob("*.tmp"):
            if torn:
                os.truncate(part, part.stat().st_size // 2)
        self.intact = {step for step in self.intact if self.path(step).exists()}
        if self.path(self.step).exists():
            with suppress(CheckpointError):
                checkpoint.verify(self.path(self.step))
                self.intact.add(self.step)
        self.resume()

    @precondition(lambda self: len(self.intact) > 1)
    @rule(choice=st.randoms(use_true_random=False), how=st.sampled_from(["flip", "cut", "empty", "no hash", "gone"]))
    def damage(self, choice: random.Random, how: str) -> None:
        self.happened.add("damage")
        step = choice.choice(sorted(self.intact))
        path = self.path(step)
        content = bytearray(path.read_bytes())
        if how == "flip":
            content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
            path.write_bytes(content)
        elif how in ("cut", "empty"):
            os.truncate(path, choice.randrange(len(content)) if how == "cut" else 0)
        else:
            (sidecar(path) if how == "no hash" else path).unlink()
        self.intact.remove(step)

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        self.happened.add("prune")
        checkpoint.prune(self.folder, keep)
        self.intact = {step for step in self.intact if self.path(step).exists()}

    @rule()
    def resume(self) -> None:
        """The process is killed; another one continues from the newest checkpoint that verifies."""
        self.happened.add("resume")
        self.writer.close()
        path, _ = checkpoint.newest(self.folder)
        assert path is not None
        state, meta = checkpoint.load(path, state_at(0))
        checkpoint.sweep(self.folder)
        assert not list(self.folder.glob("*.tmp"))
        self.start(meta["step"], state)

    @invariant()
    def the_newest_intact_checkpoint_is_found(self) -> None:
        path, _ = checkpoint.newest(self.folder)
        assert path is not None
        assert checkpoint.step_of(path) == max(self.intact)

    @invariant()
    def every_state_is_that_of_the_uninterrupted_run(self) -> None:
        expected = state_at(self.step)
        assert all(torch.equal(self.state[name], expected[name]) for name in expected)


def test_any_sequence_of_faults_continues_exactly() -> None:
    """After any sequence of saves, kills, damage and full disks, a run continues exactly from its newest checkpoint."""
    Runs.happened.clear()
    every_kind = {"full disk", "kill", "damage", "prune", "resume"}
    for _ in range(5):  # damage needs two checkpoints, which 25 sequences may not have
        run_state_machine_as_test(Runs, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))
        if Runs.happened == every_kind:
            break
    assert Runs.happened == every_kind
