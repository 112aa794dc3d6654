"""One command, several processes: what torchrun tells a rank of itself, and torchrun started for `--gpus N`."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from fastmoco.errors import AlreadyReportedError, ConfigError, RankLostError

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class RankInfo(NamedTuple):
    """Which of how many processes this is: of all of them, and on this machine. A machine is one torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0
    restarts: int = 0

    @staticmethod
    def from_environment() -> RankInfo:
        """As torchrun sets it; the only process where it does not. Raises ConfigError for what it would not set."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
        return RankInfo(*(_variable(name, default) for name, default in zip(names, RankInfo(), strict=True)))


SINGLE_PROCESS = RankInfo()


def _variable(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise ConfigError(f"the environment variable {name} is {value!r}, expected a number as torchrun sets it")
    return int(value)


def is_launched() -> bool:
    """Whether torchrun, or something like it, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(processes: int, argv: list[str]) -> None:
    """`torchrun --standalone --nproc-per-node PROCESSES -m fastmoco ARGV`.

    Raises AlreadyReportedError with the exit code of the run, unless it is 0: where torchrun itself returns 1 whatever
    happened, ours is that of the rank that failed first. SIGTERM and SIGINT go on to the ranks, which save and end with
    75; after 30 s torchrun kills those that are left.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each rank has said what is wrong itself
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stacks of torch's own, of a connection that was closed
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    with tempfile.TemporaryDirectory(prefix="fastmoco-") as folder:
        options = ["--standalone", f"--nproc-per-node={processes}", f"--log-dir={folder}", "-m", "fastmoco", *argv]
        try:
            torchrun.run(torchrun.parse_args(options))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            code = _first_code(Path(folder))
            if code is not None:
                raise AlreadyReportedError(code) from error
            if failure.exitcode < 0:  # all of them were killed
                number = signal.Signals(-failure.exitcode).name
                message = f"rank {failure.local_rank} was killed by {number}: resume with --resume"
                raise RankLostError(message) from error
            raise AlreadyReportedError(failure.exitcode) from error
        except SignalException as error:
            code = _first_code(Path(folder))
            raise AlreadyReportedError(128 + error.sigval if code is None else code) from error


def report_to_torchrun(error: BaseException, code: int) -> None:
    """Leaves the message and exit code of a rank where torchrun, and `launch`, look for them."""
    path = os.environ.get(_ERROR_FILE)
    if path:
        now = str(int(time.time()))
        message = {"message": str(error), "errorCode": code, "extraInfo": {"py_callstack": "", "timestamp": now}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _first_code(folder: Path) -> int | None:
    """The exit code that the ranks of the last start left word of, the first to end before the others."""
    attempts = sorted(folder.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    if not attempts:
        return None
    files = sorted(attempts[-1].glob("*/error.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(files[0].read_text(encoding="utf-8"))["message"]["errorCode"] if files else None
