"""Settings of a run that do not define the training algorithm: output, hardware, logging, evaluation, devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import AutoKernels, KnnSpace
from fastmoco.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Output, hardware, logging, checkpoints and evaluation."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentations."""
    out: str | None = None
    """Folder of the run, not in that of the images (None: runs/NAME)."""
    overwrite: bool = False
    """Delete an existing run in --out; refused if it has anything else in it."""
    resume: bool = False
    """Go on from the newest checkpoint of a run, --resume RUN, or of --out."""
    resume_from: str | None = None
    """Go on from a run or checkpoint in a new run; its settings are the defaults. Ignored with --resume."""
    allow_changed: tuple[str, ...] = ()
    """With --resume: settings that may change although the weights depend on them, such as batch-size."""
    allow_changed_data: bool = False
    """With --resume: go on although the images are not those that the checkpoint was trained on."""
    deterministic: bool = False
    """Deterministic algorithms: repeated runs give bit-identical weights, at some cost in speed."""
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast precision of the encoders (auto: bf16 if the hardware has it; else fp16, or fp32 on a CPU)."""
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """torch.compile mode of the encoders (auto: default in long runs on one GPU, else off)."""
    kernels: AutoKernels = "auto"
    """Kernels of batch norm, loss and update (auto: triton on a GPU).

    triton-fused: the 1×1 convolutions of bottleneck blocks, too, in the same kernels as their batch norms; from compute
    capability 8.0 on, and not in compiled encoders. With auto, --tune tries it where the backbone has such blocks."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the training step as a CUDA graph and replay it (auto: on a GPU)."""
    stem_format: Literal["auto", "channels-last", "contiguous"] = "auto"
    """Memory format of the first convolution, whose input has three channels (auto: channels-last, unless tuned)."""
    prefetch: Literal["auto", "on", "off"] = "auto"
    """Prepare the next batch on the device during the step, in a stream of its own (auto: on a GPU, unless tuned)."""
    check: Literal["on", "off", "strict"] = "on"
    """Compare the first step with plain PyTorch; fast paths that fail are left out (strict: are an error)."""
    tune: Literal["auto", "off", "now"] = "auto"
    """Time the settings above that are auto and take the fastest (auto: on a GPU, for runs of 20 minutes or more)."""
    checkpoint_activations: bool = False
    """Activation checkpointing: keep the input of each stage of the query encoder and recompute the rest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on (auto: cuda if available)."""
    cpu_threads: int | None = None
    """Compute threads on a CPU (None: tuned during training; all cores with --deterministic)."""
    log_every: int = 50
    """Steps between log entries."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (None: at the end of an epoch, at most once a minute)."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    knn_every: int | None = None
    """Epochs between kNN evaluations; 0 for none (None: from the closest recipe, or about 20 per run)."""
    knn_k: int = 200
    """Number of neighbours in the kNN evaluation."""
    knn_t: float = 0.1
    """Temperature of the weighted votes in the kNN evaluation."""
    knn_on: KnnSpace = "both"
    """Where the kNN evaluation finds neighbours: backbone features, the encoder's output (CIFAR demo), or both."""
    allow_large_queue: bool = False
    """Allow a queue larger than the data set, which then has several keys of the same image."""
    max_skipped_steps: int = 50
    """Stop with exit code 5 if more than half of so many consecutive steps have a non-finite loss or gradient."""
    tensorboard: bool = True
    """Write TensorBoard event files to tb/."""
    wandb: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also send metrics to Weights & Biases (uv sync --inexact --extra wandb); WANDB_PROJECT, WANDB_MODE=offline, ...
    apply."""
    mlflow: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also send metrics to MLflow (uv sync --inexact --extra mlflow); MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME
    apply."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "seed", lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295")
        require(self, "out", lambda v: v != "" and "\0" not in v, "a folder")
        require(self, "resume_from", lambda v: v != "" and "\0" not in v, "a run or a checkpoint")
        require(self, "cpu_threads", lambda v: 1 <= v <= 1024, "1 to 1024 threads")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "knn_k", "max_skipped_steps"):
            require(self, name, lambda v: v > 0, "1 or more")
        require(self, "knn_every", lambda v: v >= 0, "0 or more", "0 switches the kNN evaluation off")
        require(self, "knn_t", lambda v: v > 0, "a temperature above 0", "the authors use 0.1")
        if self.checkpoint_activations and self.compile not in ("auto", "off"):
            raise ConfigError(
                f"--checkpoint-activations needs --compile off, and it is {self.compile}: torch.compile itself selects "
                "the activations to keep; drop one of the two"
            )
        if self.resume and self.overwrite:
            raise ConfigError("--resume continues a run and --overwrite deletes it: drop one of the two")


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Training on several devices."""

    gpus: int | None = None
    """Processes on this machine, one per GPU or share of the CPU; started through torchrun (None: only this one)."""
    grad_comm: Literal["fp32", "bf16"] = "fp32"
    """Number format of the gradient all-reduce; bf16 halves the traffic."""
    dist_timeout: float = 600.0
    """Seconds after which an unresponsive rank is considered lost; the run stops and can be resumed."""
    paranoid: bool = False
    """Check at every log entry that weights, queue and optimiser state are bit-identical on all ranks."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "gpus", lambda v: v > 0, "1 or more")
        require(self, "dist_timeout", lambda v: 1 <= v <= 86400, "1 to 86400 seconds")
