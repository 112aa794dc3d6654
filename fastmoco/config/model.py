"""Settings of the encoders, the keys and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import Arch, AutoStem, Objective
from fastmoco.errors import ConfigError
from fastmoco.registry import ARCHITECTURES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoders, the keys and the loss."""

    arch: Arch | None = None
    """Backbone; timm/NAME is a convolutional model of timm, own/NAME one given in Python (None: from the closest
    recipe)."""
    width: float = 1.0
    """Width multiplier: factor on all channel counts of the backbone."""
    stem: AutoStem = "auto"
    """First layers: imagenet is 7x7, stride 2, max-pool; cifar is 3x3, stride 1 (auto: cifar for crops up to 64 px)."""
    stem_init: Literal["he", "torch"] = "he"
    """Initial weights of the first convolution: he, as torchvision's ResNets, or torch's default (the CIFAR demo)."""
    head: tuple[int, ...] | None = None
    """Widths of the hidden layers of the projection head (None: a linear head, as in MoCo v1)."""
    mlp: bool = False
    """MoCo v2's projection head: one hidden layer as wide as the backbone's features."""
    init: str | None = None
    """Backbone to start from: a run, or any file that fastmoco eval reads (None: random weights)."""
    init_prefix: str | None = None
    """Which of several backbones in --init: part of their tensors' names, e.g. teacher (None: the query encoder)."""
    init_sha256: str | None = None
    """SHA-256 that the weights of --init must have (None: any; it is recorded in config.json)."""
    moco_dim: int = 128
    """Dimension of the embeddings."""
    moco_k: int | None = None
    """Keys in the queue (None: from the closest recipe; at most the number of images)."""
    moco_m: float | None = None
    """EMA momentum of the key encoder; the authors use 0.999, and 0.99 for CIFAR (None: from the closest recipe)."""
    moco_m_cos: bool = False
    """Increase the EMA momentum to 1 with a half-cosine schedule."""
    moco_t: float | None = None
    """Softmax temperature; 0.07 in MoCo v1, 0.2 in v2, 0.1 for CIFAR (None: from the closest recipe)."""
    symmetric: bool = False
    """Symmetric loss: each view is the query once and the key once."""
    objective: Objective = "info-nce"
    """Contrastive loss."""
    mechanism: Literal["queue", "end-to-end", "memory-bank"] = "queue"
    """Source of keys: MoCo's queue, the batch with gradients into both encoders, or one stored feature per image."""
    bank_m: float = 0.5
    """Momentum of the stored features of --mechanism memory-bank."""
    bn_splits: int | None = None
    """Groups of a batch with separate batch norm statistics; 1 is plain batch norm (None: 1 to 8, of 16 or more)."""

    def __post_init__(self) -> None:
        check_types(self)
        usual = "1 is the published width, 0.25 a quarter of it"
        require(self, "width", lambda v: 0 < v <= 64 and (8 * v).is_integer(), "a multiple of 0.125 up to 64", usual)
        require(self, "head", lambda v: all(width > 0 for width in v), "layer widths above 0")
        require(self, "moco_dim", lambda v: v > 0, "1 or more")
        require(self, "moco_k", lambda v: v > 0, "1 or more", "the authors use 65536, and 4096 for CIFAR")
        require(self, "moco_m", lambda v: 0 <= v <= 1, "a number from 0 to 1", "the authors use 0.999")
        require(self, "moco_t", lambda v: v > 0, "a temperature above 0", "the authors use 0.07, and 0.2 in v2")
        require(self, "bn_splits", lambda v: v > 0, "1 or more", "1 is plain batch norm")
        require(self, "bank_m", lambda v: 0 <= v < 1, "a number from 0 to below 1", "Wu et al. use 0.5")
        if self.mlp and self.head is not None:
            raise ConfigError("--mlp and --head both define the projection head: drop one of the two")
        self._check_family()
        self._check_init()
        self._check_mechanism()

    def _check_family(self) -> None:
        """Reject settings of our own ResNets for the models of others, which are taken as they are."""
        if self.arch is None or self.arch in ARCHITECTURES:
            return
        for name, ours, usual in (("stem", self.stem == "cifar", "auto"), ("width", self.width != 1, "1")):
            if ours:
                value = f"{getattr(self, name)}" if name == "stem" else f"{self.width:g}"
                raise ConfigError(
                    f"--{name} {value} is for the ResNets of torchvision's names, and {self.arch} is taken as it is: "
                    f"use --{name} {usual}"
                )

    def _check_init(self) -> None:
        for name in ("init", "init_prefix"):
            require(self, name, lambda v: v.strip(".") != "" and "\0" not in v, "a path or a name")
        require(self, "init_sha256", lambda v: len(v) == 64 and set(v) <= set("0123456789abcdef"), "64 hex digits")
        if self.init is None and (self.init_prefix is not None or self.init_sha256 is not None):
            option = "--init-prefix" if self.init_prefix is not None else "--init-sha256"
            raise ConfigError(f"{option} is about the weights of --init, which is not given: add --init FILE")

    def _check_mechanism(self) -> None:
        """Reject settings of the momentum encoder for mechanisms without one."""
        if self.mechanism == "queue":
            return
        if self.moco_m not in (None, 0.0) or self.moco_m_cos:
            setting = "--moco-m-cos is set" if self.moco_m_cos else f"--moco-m is {self.moco_m:g}"
            raise ConfigError(
                f"{setting}, but --mechanism {self.mechanism} has no momentum encoder: use --moco-m 0 "
                "--no-moco-m-cos, or --mechanism queue"
            )
        if self.mechanism == "memory-bank" and self.symmetric:
            raise ConfigError(
                "--symmetric swaps the queries and keys of a batch, but with --mechanism memory-bank keys come from "
                "the bank: use --no-symmetric, or --mechanism queue"
            )
