"""Exit codes and the errors behind them. A message is one line: the actual value, the expected one, and what to do."""

import sys
from enum import IntEnum

from pipelines.errors import BackendMissingError, DataError


class ExitCode(IntEnum):
    """Exit code of the process, also recorded in `status.json`."""

    DONE = 0
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    DIVERGED = 5
    DEVICE = 6
    PREEMPTED = 75


class ConfigError(ValueError):
    """An invalid value, flag or combination of settings."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, corrupt, or from another run."""


class DivergedError(RuntimeError):
    """The loss or gradients were not finite for too many steps."""


class DeviceError(RuntimeError):
    """The device failed, is missing or ran out of memory."""


class RankLostError(RuntimeError):
    """Another rank exited or was unresponsive for too long; the run can resume from its last checkpoint."""


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The command received SIGTERM, SIGINT or SIGHUP: a run that has begun is saved and can be resumed."""


class Interrupted(KeyboardInterrupt):
    """A signal has interrupted something that needs no saving; it becomes Preempted where the command ends.

    Code that lets Ctrl-C pass lets this pass too.
    """


class AlreadyReportedError(Exception):
    """This process ends because another one failed and reported the reason; only the exit code is left to return."""

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
    Interrupted: ExitCode.PREEMPTED,
    RankLostError: ExitCode.PREEMPTED,
}


def _codes() -> dict[type[BaseException], ExitCode]:
    """`_CODES`, and torch's own error once torch is imported, which takes seconds and is not done here."""
    torch = sys.modules.get("torch")
    return _CODES if torch is None else {**_CODES, torch.OutOfMemoryError: ExitCode.DEVICE}


def exit_code(error: BaseException) -> ExitCode | None:
    """The exit code of an error that the user can act on; None for a bug in fastmoco."""
    return next((code for kind, code in _codes().items() if isinstance(error, kind)), None)


def error_named(name: str, message: str) -> Exception:
    """Rebuild an error of another rank, to be raised here too; a bug becomes RankLostError."""
    kind = next((kind for kind in _codes() if kind.__name__ == name), None)
    if kind is None or not issubclass(kind, Exception):
        return RankLostError(f"another rank failed ({name}: {message.partition(chr(10))[0]}): resume with --resume")
    return kind(message)
