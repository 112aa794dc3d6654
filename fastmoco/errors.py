"""Exit codes, and the errors that lead to them. A message is one line: what was found, expected, and what to do."""

import sys
from enum import IntEnum

from pipelines.errors import BackendMissingError, DataError


class ExitCode(IntEnum):
    """What the process returns, and `status.json` records."""

    DONE = 0
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    DIVERGED = 5
    DEVICE = 6
    PREEMPTED = 75


class ConfigError(ValueError):
    """A value, flag or combination of settings that cannot be trained with."""


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or belongs to another run."""


class DivergedError(RuntimeError):
    """The loss or the gradients stopped being finite for too many steps."""


class DeviceError(RuntimeError):
    """The device failed, is absent or ran out of memory."""


class RankLostError(RuntimeError):
    """Another rank of the run is gone, or silent for too long: resumable from the last checkpoint."""


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop (SIGTERM or SIGINT), has saved its state and can be resumed."""


class AlreadyReportedError(Exception):
    """This process ends with others, one of which has said why; there is nothing to add but the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


_CODES: dict[type[BaseException], ExitCode] = {
    ConfigError: ExitCode.CONFIG,
    BackendMissingError: ExitCode.CONFIG,
    DataError: ExitCode.DATA,
    CheckpointError: ExitCode.CHECKPOINT,
    DivergedError: ExitCode.DIVERGED,
    DeviceError: ExitCode.DEVICE,
    Preempted: ExitCode.PREEMPTED,
    RankLostError: ExitCode.PREEMPTED,
}


def _codes() -> dict[type[BaseException], ExitCode]:
    """The above, and torch's own error. It takes seconds to load torch, and until then nothing raises that one."""
    torch = sys.modules.get("torch")
    return _CODES if torch is None else {**_CODES, torch.OutOfMemoryError: ExitCode.DEVICE}


def exit_code(error: BaseException) -> ExitCode | None:
    """The exit code of an error that people can do something about; None for a fault of our own."""
    return next((code for kind, code in _codes().items() if isinstance(error, kind)), None)


def error_named(name: str, message: str) -> Exception:
    """An error that another rank has met, to be raised here too; a fault of our own is one of that rank."""
    kind = next((kind for kind in _codes() if kind.__name__ == name), None)
    if kind is None or not issubclass(kind, Exception):
        return RankLostError(f"another rank failed ({name}: {message.partition(chr(10))[0]}): resume with --resume")
    return kind(message)
