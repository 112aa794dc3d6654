"""Exit codes, and the errors that lead to them. A message is one line: what was found, expected, and what to do."""

from enum import IntEnum


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


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop (SIGTERM or SIGINT), has saved its state and can be resumed."""
