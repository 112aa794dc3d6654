"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmoco.errors import DivergedError
from fastmoco.run import checkpoint
from fastmoco.run.divergence import not_finite, tolerated_streak
from fastmoco.run.snapshot import HostBuffers, Snapshot

SKIPPED = "step/sums/consecutive_skipped"  # name in a checkpoint of the count of steps up to it that changed nothing
_SCALE = "step/scaler/scale"  # of float16


class CheckpointWriter:
    """Saves checkpoints to a folder in a thread of its own, one at a time, and keeps the `keep` newest.

    `start` copies the tensors and returns; `wait` returns when the file is complete, or raises the error of writing it.
    A process that ends without `wait` or `close` may lose the checkpoint in progress, but no earlier one.

    State that is not finite is not written, so that the earlier checkpoints stay. Nor, unless it is the last chance, is
    state that no step has changed since the checkpoint before, or at which several steps in a row were skipped: a run
    that diverges would replace those from before.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.buffers = HostBuffers()
        self._directory, self._keep = directory, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._written_step = -1

    @property
    def is_pending(self) -> bool:
        """Whether a save was started whose result `wait` has not returned yet."""
        return self._writing is not None

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def start(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        saved: Callable[[], None],
        *,
        last_chance: bool = False,
    ) -> None:
        """Save the tensors as they are now; `saved` is called in the background once the file is complete."""
        assert self._writing is None, "the buffers are in use until `wait` returns"
        snapshot = self.buffers.take(tensors)
        self._writing = self._thread.submit(self._write, step, snapshot, meta, saved, last_chance)

    def wait(self) -> None:
        """Wait for the save in progress, if any.

        Raises CheckpointError if it failed, after which another may be started, and DivergedError if the state is not
        finite.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, whatever the result, and end the thread."""
        self._thread.shutdown(wait=True)

    def _write(
        self, step: int, snapshot: Snapshot, meta: Mapping[str, Any], saved: Callable[[], None], last_chance: bool
    ) -> None:
        tensors = snapshot.wait()
        skipped = int(tensors[SKIPPED]) if SKIPPED in tensors else 0
        if bad := not_finite(tensors):
            raise DivergedError(
                f"the state is not finite since step {step - skipped:,} ({bad[0]}{' and others' * (len(bad) > 1)}): "
                f"lower --lr; it is not saved, and the checkpoints from before it stay in {self._directory}"
            )
        learns = skipped <= tolerated_streak(_SCALE in tensors) and self._written_step < step - skipped
        if last_chance or learns:
            checkpoint.save(self._directory, step, tensors, meta)
            self._written_step = step
            checkpoint.prune(self._directory, self._keep)
        saved()
