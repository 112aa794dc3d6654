"""The result of a check, and the checks by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Status(StrEnum):
    """ok, tried and right; failed, tried and wrong, crashed or too slow; missing, not installed; skipped, not for here.

    Only `failed` is an error of the machine: what is missing or skipped is left out of training too.
    """

    OK = "ok"
    FAILED = "failed"
    MISSING = "missing"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    text     one line for people
    figures  the numbers behind it, for programs: JSON values, with units in the names
    advice   what to do, and what that would bring; empty if there is nothing to do
    """

    status: Status = Status.OK
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""


class Target(NamedTuple):
    """What every check is called with.

    device   as torch names it, such as "cuda:0"; for the check of the device itself, the value of --device
    folder   the folder whose disk is measured
    scratch  a temporary folder that all checks share
    gpus     number of visible GPUs if the device is one, else 0
    """

    device: str
    folder: str
    scratch: str
    gpus: int = 0


class Check(NamedTuple):
    """A part to try.

    run      "module:function" of a function from Target to Finding. BackendMissingError means that the part is missing,
             any other exception that it failed
    limit_s  seconds after which the process of the check is killed: many times what it takes on an idle machine. The
             first check waits for the import of torch, and that of workers and of FFCV for more
    """

    group: str
    name: str
    run: str
    limit_s: float = 60.0


class Result(NamedTuple):
    """A check, its finding, and how long it took."""

    check: Check
    finding: Finding
    seconds: float


DEVICE = Check("device", "device", "fastmoco.doctor.device:device", 180.0)
CHOICES = Check("training", "training", "fastmoco.doctor.choices:choices")

CHECKS = (
    Check("machine", "software", "fastmoco.doctor.machine:software"),
    Check("machine", "processor", "fastmoco.doctor.machine:processor"),
    Check("machine", "memory", "fastmoco.doctor.machine:memory"),
    Check("machine", "shared memory", "fastmoco.doctor.machine:shared_memory"),
    Check("machine", "open files", "fastmoco.doctor.machine:open_files"),
    Check("machine", "disk", "fastmoco.doctor.disk:disk"),
    DEVICE,
    Check("device", "arithmetic", "fastmoco.doctor.device:arithmetic"),
    Check("device", "copies", "fastmoco.doctor.device:copies"),
    Check("kernels", "triton", "fastmoco.doctor.kernels:triton"),
    Check("kernels", "batch norm", "fastmoco.doctor.kernels:batch_norm"),
    Check("kernels", "1×1 convolution", "fastmoco.doctor.pointwise:pointwise"),
    Check("kernels", "InfoNCE", "fastmoco.doctor.kernels:info_nce"),
    Check("kernels", "SGD and EMA", "fastmoco.doctor.kernels:update"),
    Check("kernels", "colour", "fastmoco.doctor.pixels:colour"),
    Check("kernels", "crop", "fastmoco.doctor.pixels:crop"),
    Check("loading", "resident", "fastmoco.doctor.loading:resident"),
    Check("loading", "torch", "fastmoco.doctor.loading:workers", 120.0),
    Check("loading", "dali", "fastmoco.doctor.loading:dali"),
    Check("loading", "ffcv", "fastmoco.doctor.loading:ffcv", 120.0),
    Check("loading", "dataloader", "fastmoco.doctor.loading:dataloader"),
    Check("step", "training step", "fastmoco.doctor.steps:eager"),
    Check("step", "CUDA graph", "fastmoco.doctor.steps:graph", 90.0),
    Check("step", "torch.compile", "fastmoco.doctor.steps:compiled", 120.0),
    Check("distributed", "gloo", "fastmoco.doctor.ranks:gloo"),
    Check("distributed", "NCCL", "fastmoco.doctor.ranks:nccl", 90.0),
    CHOICES,
)
"""All checks, in the order in which they run and are printed."""

GROUPS = tuple(dict.fromkeys(check.group for check in CHECKS if check is not CHOICES))
