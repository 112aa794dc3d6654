"""The settings of a run that do not say what is learnt: where it lives, on what and on how many devices it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import AutoKernels
from fastmoco.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run lives, what it runs on, what it writes and when it stops."""

    seed: int = 0
    """The same seed gives the same images, crops, colours and weights."""
    out: str | None = None
    """Folder of the run (None: runs/NAME)."""
    overwrite: bool = False
    """Delete an earlier run in that folder."""
    resume: bool = False
    """Go on from the newest checkpoint in that folder."""
    deterministic: bool = False
    """Bit-identical weights on every repetition, at some cost in speed."""
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format of the encoders' arithmetic."""
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """torch.compile for the encoders (auto: on a GPU, where --kernels is torch)."""
    kernels: AutoKernels = "auto"
    """Implementation of batch norm, loss and update (auto: triton on a GPU). Compiled encoders keep torch's batch
    norm."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole training step once and replay it (auto: on a GPU)."""
    checkpoint_activations: bool = False
    """Keep only what enters each stage of the query encoder, and compute the rest again: less memory, more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    cpu_threads: int | None = None
    """Threads that compute on a CPU (None: as many as are fastest at the time; all of them with --deterministic)."""
    log_every: int = 50
    """Log every N steps."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints (None: the end of an epoch, at most once a minute)."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    knn_every: int | None = None
    """Epochs between two kNN evaluations, 0 for none (None: from the data)."""
    knn_k: int = 200
    """Neighbours that vote in the kNN evaluation."""
    knn_t: float = 0.1
    """Temperature of the votes in the kNN evaluation."""
    allow_large_queue: bool = False
    """Let the queue be larger than the data set, so that it holds several keys of an image."""
    max_skipped_steps: int = 50
    """Consecutive steps with a loss or gradient that is not finite, after which the run stops with exit code 5."""
    tensorboard: bool = True
    """Write TensorBoard files to tb/."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "seed", lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295")
        require(self, "out", lambda v: v != "" and "\0" not in v, "a folder")
        require(self, "cpu_threads", lambda v: 1 <= v <= 1024, "1 to 1024 threads")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "knn_k", "max_skipped_steps"):
            require(self, name, lambda v: v > 0, "1 or more")
        require(self, "knn_every", lambda v: v >= 0, "0 or more", "0 switches the kNN evaluation off")
        require(self, "knn_t", lambda v: v > 0, "a temperature above 0", "the authors use 0.1")
        if self.checkpoint_activations and self.compile not in ("auto", "off"):
            raise ConfigError(
                f"--checkpoint-activations needs --compile off, and it is {self.compile}: a compiled forward decides "
                "itself what it keeps; drop one of the two"
            )
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite deletes it: drop one of the two")


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Several devices."""

    gpus: int | None = None
    """Processes to start on this machine through torchrun, each with a GPU of its own, or a share of the CPU (None:
    this one alone, or as torchrun has started it)."""
    grad_comm: Literal["fp32", "bf16"] = "fp32"
    """Number format in which devices send each other gradients; bf16 is half the bytes."""
    dist_timeout: float = 600.0
    """Seconds after which an unresponsive rank is considered lost; the run ends and can be resumed."""
    paranoid: bool = False
    """Compare weights, queue and optimiser of all devices bit for bit, whenever the loss is read."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "gpus", lambda v: v > 0, "1 or more")
        require(self, "dist_timeout", lambda v: 1 <= v <= 86400, "1 to 86400 seconds")
