"""Ends a command that waits for an image on a disk or network mount that no longer answers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fastmoco.errors import ExitCode
from pipelines import reads
from pipelines.errors import DataError

_REPORT_S = 2.0


@contextmanager
def ended_by_stuck_reads(report: Callable[[DataError], object] = lambda error: None) -> Iterator[None]:
    """Within the block, a read that takes longer than `reads.LIMIT_S` ends the process with exit code 3 and one line.

    report  called with the error before; it has two seconds, for it may wait for the same disk
    """

    def end(line: str) -> None:
        with suppress(OSError, ValueError):  # stderr may be closed
            print(f"fastmoco: error: {line}", file=sys.stderr, flush=True)
        reporting = threading.Thread(target=report, args=(DataError(line),), daemon=True)
        reporting.start()
        reporting.join(_REPORT_S)
        os._exit(ExitCode.DATA)

    ended = reads.watch(reads.LIMIT_S, end)
    try:
        yield
    finally:
        ended.set()
