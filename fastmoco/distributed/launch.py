"""torchrun: the rank information in its environment, launching it for `--gpus N`, and exit codes of ranks."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fastmoco.errors import AlreadyReportedError, ConfigError, RankLostError
from pipelines.files import write_atomically
from pipelines.platforms import usable_cpus

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class RankInfo(NamedTuple):
    """Global and local rank of this process. A machine is one torchrun agent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0
    restarts: int = 0

    @staticmethod
    def from_environment() -> RankInfo:
        """Read torchrun's variables; without them, this is the only process. Raises ConfigError on invalid values."""
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
    """Whether torchrun or a similar launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(processes: int, argv: list[str]) -> None:
    """Run `torchrun --standalone --nproc-per-node PROCESSES -m fastmoco ARGV`.

    Raises AlreadyReportedError with the exit code of the rank that failed first, where torchrun itself always returns
    1, and RankLostError if a rank was killed. SIGTERM and SIGINT are forwarded to the ranks, which save and exit with
    75; torchrun kills the remaining ones after 30 s.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report their own errors
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides torch's stack traces for closed connections
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // processes)))
    with tempfile.TemporaryDirectory(prefix="fastmoco-") as folder:
        options = ["--standalone", f"--nproc-per-node={processes}", f"--log-dir={folder}", "-m", "fastmoco", *argv]
        try:
            torchrun.run(torchrun.parse_args(options))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            code = _first_code(Path(folder))
            if code is not None:
                raise AlreadyReportedError(code) from error
            if failure.exitcode < 0:  # every rank was killed
                name = signal.Signals(-failure.exitcode).name
                message = f"rank {failure.local_rank} was killed by {name}: resume with --resume"
                raise RankLostError(message) from error
            raise AlreadyReportedError(failure.exitcode) from error
        except SignalException as error:
            code = _first_code(Path(folder))
            raise AlreadyReportedError(128 + error.sigval if code is None else code) from error


def report_to_torchrun(error: BaseException, code: int) -> None:
    """Write the message and exit code of a rank to the error file that torchrun and `launch` read."""
    path = os.environ.get(_ERROR_FILE)
    if path:
        now = str(int(time.time()))
        message = {"message": str(error), "errorCode": code, "extraInfo": {"py_callstack": "", "timestamp": now}}
        with suppress(OSError):  # a full disk must not hide the error
            write_atomically(Path(path), json.dumps({"message": message}))


def _first_code(folder: Path) -> int | None:
    """The exit code that a rank of the last attempt reported first, or None."""
    attempts = sorted(folder.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    if not attempts:
        return None
    files = sorted(attempts[-1].glob("*/error.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(files[0].read_text(encoding="utf-8"))["message"]["errorCode"] if files else None
