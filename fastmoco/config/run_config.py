"""The configuration of a run: one tree of frozen dataclasses, validated once, JSON in and out.

Field names are unique over the whole tree, so that a field, its flag (`moco_k`, `--moco-k`) and its name in a message
are the same wherever it lives. Flags keep the names of facebookresearch/moco where that has one. A field that is None
has no value yet: the right one depends on the data, and is filled in before training starts. Errors are `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from fastmoco.config.checks import as_object, check_types, group_types, known, parse_json, require
from fastmoco.config.choices import Arch, Aug, AutoPipeline, AutoStem, Objective, Optimizer
from fastmoco.config.run_options import RunOptions, ScaleOptions
from fastmoco.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the device."""

    data: str = "shapes"
    """A folder of images, a text file of paths, or a name: shapes (drawn in memory), cifar10, stl10, imagenette, ..."""
    data_root: str = "~/.cache/fastmoco"
    """Where named data sets are downloaded to."""
    limit: int | None = None
    """Train on this many images only, the same share of every class."""
    pipeline: AutoPipeline = "auto"
    """How images are decoded and augmented; auto says what it chose and why."""
    workers: int | None = None
    """Threads or processes that decode (None: from the number of cores)."""
    bad_images: Literal["error", "quarantine"] = "error"
    """What an image that cannot be read means: stop, or leave it out and list it."""
    order: Literal["any", "archives"] = "any"
    """Any order of all images, or one tar archive after another, mixed as by a buffer: for disks that are far away."""
    order_buffer: int = 10_000
    """Images in the buffer of --order archives."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "order_buffer", lambda v: v >= 0, "0 images or more")
        require(self, "data", lambda v: v != "" and "\0" not in v, "a folder, a list file or the name of a data set")
        require(self, "limit", lambda v: v > 0, "a number of images above 0")
        require(self, "workers", lambda v: v >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How one image becomes two views."""

    crop_size: int | None = None
    """Side of a view in pixels (None: the images' own if small and uniform, else 224)."""
    aug: Aug | None = None
    """Augmentation of MoCo v1, of v2, of the authors' CIFAR demo, or of BYOL (None: from the data)."""
    aug_plus: bool = False
    """The same as --aug v2."""
    crop_scale_min: float | None = None
    """Smallest area of a random crop, as a fraction of the image (None: of the augmentation, 0.2)."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "crop_size", lambda v: v >= 8, "8 pixels or more")
        require(self, "crop_scale_min", lambda v: 0 < v <= 1, "a fraction above 0 and up to 1")
        if self.aug_plus and self.aug not in (None, "v2"):
            raise ConfigError(f"--aug-plus means --aug v2, but --aug is {self.aug}: drop one of the two")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoders, the queue and the loss."""

    arch: Arch | None = None
    """Backbone (None: from the size of the images)."""
    width: float = 1.0
    """Factor on every channel count of the backbone."""
    stem: AutoStem = "auto"
    """First layers: 7x7 stride 2 and max-pool, or 3x3 stride 1 for small images."""
    head: tuple[int, ...] | None = None
    """Hidden widths of the projection head; none means a linear layer."""
    mlp: bool = False
    """MoCo v2's head: one hidden layer as wide as the backbone's features."""
    moco_dim: int = 128
    """Length of an embedding."""
    moco_k: int | None = None
    """Number of keys in the queue (None: from the data)."""
    moco_m: float | None = None
    """EMA momentum of the key encoder (None: from the data)."""
    moco_m_cos: bool = False
    """Raise the EMA momentum to 1 along a half cosine."""
    moco_t: float | None = None
    """Softmax temperature (None: from the data)."""
    symmetric: bool = False
    """Use each view once as query and once as key; two queries an image."""
    objective: Objective = "info-nce"
    """Contrastive loss."""
    mechanism: Literal["queue", "end-to-end", "memory-bank"] = "queue"
    """Where keys come from: a queue filled by a key encoder that follows (MoCo), the batch itself with gradients into
    both encoders, or a bank with one stored feature an image."""
    bank_m: float = 0.5
    """Momentum of a stored feature, with --mechanism memory-bank."""
    bn_splits: int | None = None
    """Groups of a batch that are normalised apart, as if on so many devices; 1 is plain batch norm."""

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
        self._check_mechanism()

    def _check_mechanism(self) -> None:
        """Refuse settings of the queue's key encoder where there is none."""
        if self.mechanism == "queue":
            return
        if self.moco_m not in (None, 0.0) or self.moco_m_cos:
            found = "--moco-m-cos is set" if self.moco_m_cos else f"--moco-m is {self.moco_m:g}"
            raise ConfigError(
                f"{found}, and --mechanism {self.mechanism} has no key encoder that follows slowly: use --moco-m 0 "
                "--no-moco-m-cos, or --mechanism queue"
            )
        if self.mechanism == "memory-bank" and self.symmetric:
            raise ConfigError(
                "--symmetric exchanges queries and keys of a batch, and with --mechanism memory-bank keys come from "
                "the bank: use --no-symmetric, or --mechanism queue"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, its schedule and its length."""

    optimizer: Optimizer = "sgd"
    """Update of the query encoder; the moving average of the key encoder goes with it."""
    batch_size: int | None = None
    """Images a step, over all devices together (None: from the data)."""
    lr: float | None = None
    """Learning rate at the start (None: from the data and the batch)."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """Whether an open learning rate is the recipe's times the batch over the recipe's batch, or the recipe's."""
    wd: float | None = None
    """Weight decay (None: from the data)."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    epochs: int | None = None
    """Passes over the data (None: from the data)."""
    cos: bool = False
    """Lower the learning rate to --final-lr along a half cosine."""
    final_lr: float = 0.0
    """Where --cos ends."""
    schedule: tuple[int, ...] | None = None
    """Epochs at which the learning rate is divided by 10."""
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises linearly from 0."""
    exclude_bn_from_wd: bool = False
    """No weight decay for biases and batch-norm parameters."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "batch_size", lambda v: v >= 2, "2 or more", "batch norm has no statistics of one image")
        require(self, "lr", lambda v: v > 0, "a number above 0", "the authors use 0.03 for a batch of 256")
        require(self, "final_lr", lambda v: v >= 0, "0 or more")
        require(self, "wd", lambda v: v >= 0, "0 or more", "the authors use 0.0001")
        require(self, "sgd_momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1", "the authors use 0.9")
        require(self, "epochs", lambda v: v > 0, "1 or more")
        require(self, "warmup_epochs", lambda v: v >= 0, "0 or more")
        rising = "epochs above 0 in rising order"
        require(self, "schedule", lambda v: list(v) == sorted({*v}) and all(e > 0 for e in v), rising)
        if self.cos and self.schedule is not None:
            raise ConfigError("--cos and --schedule both define the learning rate: drop one of the two")
        if self.final_lr and (self.schedule is not None or self.final_lr > (self.lr or self.final_lr)):
            found = "--schedule ends elsewhere" if self.schedule is not None else f"the start, --lr, is {self.lr:g}"
            raise ConfigError(
                f"--final-lr is {self.final_lr:g}, the end of a cosine that falls, and {found}: use --cos with a "
                "--final-lr below --lr"
            )
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"--warmup-epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} of --epochs: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. The groups only order the flags in --help."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunOptions = field(default_factory=RunOptions)
    scale: ScaleOptions = field(default_factory=ScaleOptions)

    def __post_init__(self) -> None:
        check_types(self)
        batch, splits = self.optim.batch_size, self.model.bn_splits
        if batch is not None and splits is not None and (batch % splits or batch // splits < 2):
            fitting = max(2 * splits, batch - batch % splits)
            raise ConfigError(
                f"--batch-size {batch} cannot be split in {splits} equal groups of 2 or more for batch norm: "
                f"use --batch-size {fitting} or --bn-splits 1"
            )

    def flat(self) -> dict[str, Any]:
        """Every field and its value, without the groups."""
        return {name: value for group in group_types(RunConfig) for name, value in vars(getattr(self, group)).items()}

    def replace(self, **values: Any) -> Self:
        """A copy with these fields, named without their group, set to new values. Raises ConfigError."""
        for name in values:
            known(name, self.flat(), "field")
        changed = {}
        for group in group_types(RunConfig):
            ours = {name: value for name, value in values.items() if name in vars(getattr(self, group))}
            changed[group] = dataclasses.replace(getattr(self, group), **ours)
        return type(self)(**changed)

    def to_json(self) -> str:
        """The tree as indented JSON; tuples become lists."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> RunConfig:
        """The inverse of `to_json`. Absent fields take their defaults; unknown or repeated ones raise ConfigError."""
        types, groups = group_types(RunConfig), {}
        for name, values in as_object(parse_json(text), "the configuration").items():
            known(name, types, "group")
            fields = as_object(values, f"group {name!r}")
            for key in fields:
                known(key, types[name].__dataclass_fields__, "field")
            groups[name] = types[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        return RunConfig(**groups)


FREE_ON_RESUME = frozenset(
    {"data_root", "workers", "out", "overwrite", "resume", "log_every", "checkpoint_every", "keep_checkpoints"}
    | {"knn_every", "knn_k", "knn_t", "max_skipped_steps", "tensorboard", "cuda_graph", "checkpoint_activations"}
    | {"lr_scaling", "gpus", "dist_timeout", "paranoid", "cpu_threads"}
)
"""Fields that may change when a run is resumed, because the weights depend on them by rounding at most."""


def differences(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """Every field in which two configurations differ, as (field, value in a, value in b), in the order of --help."""
    theirs = b.flat()
    return [(name, value, theirs[name]) for name, value in a.flat().items() if value != theirs[name]]
