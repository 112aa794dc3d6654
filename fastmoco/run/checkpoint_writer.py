"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmoco.run import checkpoint
from fastmoco.run.snapshot import HostBuffers, Snapshot


class CheckpointWriter:
    """Saves checkpoints to a folder in a thread of its own, one at a time, and keeps the `keep` newest.

    `start` copies the tensors and returns; `wait` returns when the file is complete, or raises the error of writing it.
    A process that ends without `wait` or `close` may lose the checkpoint in progress, but no earlier one.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.buffers = HostBuffers()
        self._directory, self._keep = directory, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a save was started whose result `wait` has not returned yet."""
        return self._writing is not None

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def start(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], saved: Callable[[], None]
    ) -> None:
        """Save the tensors as they are now; `saved` is called in the background once the file is complete."""
        assert self._writing is None, "the buffers are in use until `wait` returns"
        self._writing = self._thread.submit(self._write, step, self.buffers.take(tensors), meta, saved)

    def wait(self) -> None:
        """Wait for the save in progress, if any. Raises CheckpointError if it failed; another may be started then."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, whatever the result, and end the thread."""
        self._thread.shutdown(wait=True)

    def _write(self, step: int, snapshot: Snapshot, meta: Mapping[str, Any], saved: Callable[[], None]) -> None:
        checkpoint.save(self._directory, step, snapshot.wait(), meta)
        checkpoint.prune(self._directory, self._keep)
        saved()
