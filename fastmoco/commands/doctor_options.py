"""Options of `fastmoco doctor`. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require
from fastmoco.doctor.findings import GROUPS

DESCRIPTION = (
    "Try every part that training can use on this machine: kernels against their plain implementations, every "
    "pipeline, the training step, CUDA graph, torch.compile, gloo and NCCL; with errors, rates, and for what is "
    "missing what it would bring and how to install it. Under a minute on a CPU. Exit code 0 if all that is present "
    "works, 6 if any part of it fails or the device is missing, 2 for an invalid option. What is missing is no failure."
)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Device and disk to try, and form of the report."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to try (auto: cuda if available)."""
    data: str = "."
    """Folder whose disk is measured: where the images are. Writes up to 64 MiB there and removes them."""
    only: Literal[GROUPS] | None = None  # pyright: ignore[reportInvalidTypeForm]
    """Only the checks of one group (None: all)."""
    json: bool = False
    """Print one JSON object instead of tables: fastmoco, device, ok, exit_code, seconds, use, and in checks a list of
    group, name, status (ok, failed, missing or skipped), text, advice, figures and seconds."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "data", lambda v: "\0" not in v and os.path.isdir(v), "an existing folder")


def parse_doctor(argv: list[str]) -> DoctorOptions:
    """Parse the arguments of `fastmoco doctor`. Raises ConfigError; exits for --help."""
    return parse(DoctorOptions, argv, command="doctor", description=DESCRIPTION)
