"""What a checkpoint says of itself, checked before anything of it is used.

A hash shows that a file is the one that was written, not who wrote it: its text is checked like any input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.config.checks import shorten
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.run import checkpoint
from fastmoco.run.fingerprint import is_identity

MAX_STEP = 2**53  # counts of steps are float64


@dataclass(frozen=True)
class CheckpointMeta:
    """The run that a checkpoint is from.

    step          completed steps
    config        settings that trained it; those newer than the checkpoint have their defaults
    named         the fields of `config` that the checkpoint has
    data          fingerprint of the images
    images        their `identity`; None in a checkpoint that is older
    data_content  `DataRecord.content`; None if there was no record
    versions      of the libraries, by name; None for one that was not installed
    """

    step: int
    config: ResolvedConfig
    named: frozenset[str]
    data: str
    images: dict[str, Any] | None
    data_content: str | None
    versions: dict[str, str | None]

    @staticmethod
    def of(path: Path, meta: Mapping[str, Any]) -> CheckpointMeta:
        """Check the `meta` of `checkpoint.load` or `checkpoint.verify`. Raises CheckpointError."""
        step, config, data, versions = (meta.get(name) for name in ("step", "config", "data", "versions"))
        content, images = meta.get("data_content"), meta.get("images")
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise _invalid(path, "step", step, f"a whole number from 0 to {MAX_STEP}")
        if checkpoint.is_named(path) and checkpoint.step_of(path) != step:
            raise _invalid(path, "step", step, f"the {checkpoint.step_of(path)} of its name")
        if not isinstance(data, str):
            raise _invalid(path, "data", data, "the fingerprint of the images")
        if images is not None and not is_identity(images):
            raise _invalid(path, "images", images, "the hashes of the images")
        if not isinstance(content, str | None):
            raise _invalid(path, "data_content", content, "the hash of the images")
        if not isinstance(versions, dict) or not all(isinstance(value, str | None) for value in versions.values()):
            raise _invalid(path, "versions", versions, "the versions of libraries by name")
        if not isinstance(config, dict):
            raise _invalid(path, "config", config, "the settings of a run by name")
        return CheckpointMeta(step, _config(path, config), frozenset(config), data, images, content, versions)


def _config(path: Path, flat: Mapping[str, Any]) -> ResolvedConfig:
    try:
        return ResolvedConfig.of(
            RunConfig().replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()})
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} was not trained with settings that exist here: {error}") from None


def _invalid(path: Path, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} says that its {name} is {shorten(value)}, expected {expected}: restore the file, or use another"
    )
