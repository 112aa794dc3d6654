"""The configuration of a run: a tree of frozen dataclasses, validated on construction, with a JSON form.

Field names are unique across the tree, so that flags need no prefix (`moco_k`, `--moco-k`). Flags have the names of
facebookresearch/moco if it has an equivalent. The docstring of a field is its text in --help. For fields whose default
depends on the data, None stands for that default, and `run.resolve` replaces it before training starts. Errors are
`ConfigError`.
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
    """The images and how they are loaded."""

    data: str = "shapes"
    """Folder of images, text file of paths, or name: shapes (generated), cifar10, stl10, imagenette, ..."""
    data_root: str = "~/.cache/fastmoco"
    """Folder for downloaded data sets and caches."""
    limit: int | None = None
    """Number of images to train on, stratified by class (None: all)."""
    pipeline: AutoPipeline = "auto"
    """Implementation of decoding and augmentation (auto: by data and device; reported at start)."""
    workers: int | None = None
    """Decoding threads or processes of each rank (None: from the number of CPU cores)."""
    bad_images: Literal["error", "quarantine"] = "error"
    """Unreadable images: stop with an error, or leave them out and list them."""
    order: Literal["any", "archives"] = "any"
    """Shuffle all images, or tar archive by archive with a shuffle buffer, for disks with slow random access."""
    order_buffer: int = 10_000
    """Size of the shuffle buffer of --order archives, in images."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "order_buffer", lambda v: v >= 0, "0 images or more")
        require(self, "data", lambda v: v != "" and "\0" not in v, "a folder, a list file or the name of a data set")
        require(self, "limit", lambda v: v > 0, "a number of images above 0")
        require(self, "workers", lambda v: v >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How two views are made from an image."""

    crop_size: int | None = None
    """Side of a view in pixels (None: the median shorter side of the images, at most 224)."""
    aug: Aug | None = None
    """Augmentation of MoCo v1, MoCo v2, the authors' CIFAR demo, or BYOL (None: from the closest recipe)."""
    aug_plus: bool = False
    """Same as --aug v2."""
    crop_scale_min: float | None = None
    """Minimum area of a random crop, as a fraction of the image (None: from the closest recipe or --aug)."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "crop_size", lambda v: v >= 8, "8 pixels or more")
        require(self, "crop_scale_min", lambda v: 0 < v <= 1, "a fraction above 0 and up to 1")
        if self.aug_plus and self.aug not in (None, "v2"):
            raise ConfigError(f"--aug-plus means --aug v2, but --aug is {self.aug}: drop one of the two")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoders, the keys and the loss."""

    arch: Arch | None = None
    """Backbone (None: from the closest recipe)."""
    width: float = 1.0
    """Width multiplier: factor on all channel counts of the backbone."""
    stem: AutoStem = "auto"
    """First layers: imagenet is 7x7, stride 2, max-pool; cifar is 3x3, stride 1 (auto: cifar for crops up to 64 px)."""
    head: tuple[int, ...] | None = None
    """Widths of the hidden layers of the projection head (None: a linear head, as in MoCo v1)."""
    mlp: bool = False
    """MoCo v2's projection head: one hidden layer as wide as the backbone's features."""
    moco_dim: int = 128
    """Dimension of the embeddings."""
    moco_k: int | None = None
    """Number of keys in the queue (None: from the closest recipe, at most the number of images)."""
    moco_m: float | None = None
    """EMA momentum of the key encoder (None: from the closest recipe)."""
    moco_m_cos: bool = False
    """Increase the EMA momentum to 1 with a half-cosine schedule."""
    moco_t: float | None = None
    """Softmax temperature (None: from the closest recipe)."""
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
        self._check_mechanism()

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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    optimizer: Optimizer = "sgd"
    """Optimiser of the query encoder; it updates the key encoder's moving average in the same pass."""
    batch_size: int | None = None
    """Images per step over all devices (None: from the closest recipe, less for few images)."""
    lr: float | None = None
    """Initial learning rate (None: from the closest recipe, see --lr-scaling)."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """Without --lr: scale the closest recipe's learning rate linearly with the batch size, or leave it unchanged."""
    wd: float | None = None
    """Weight decay (None: from the closest recipe)."""
    sgd_momentum: float = 0.9
    """SGD momentum."""
    epochs: int | None = None
    """Number of epochs (None: from the closest recipe)."""
    cos: bool = False
    """Decay the learning rate to --final-lr with a half-cosine schedule."""
    final_lr: float = 0.0
    """Final learning rate of --cos."""
    schedule: tuple[int, ...] | None = None
    """Epochs at which the learning rate is divided by 10 (None: from the closest recipe, unless --cos is given)."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up of the learning rate from 0."""
    exclude_bn_from_wd: bool = False
    """Exclude biases and batch norm parameters from weight decay."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "batch_size", lambda v: v >= 2, "2 or more", "batch norm needs more than one image")
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
            conflict = "--schedule is set" if self.schedule is not None else f"the initial one, --lr, is {self.lr:g}"
            raise ConfigError(
                f"--final-lr is {self.final_lr:g}, the final value of a cosine decay, but {conflict}: use --cos with "
                "a --final-lr below --lr"
            )
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"--warmup-epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} of --epochs"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. The groups only order the flags in --help."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunOptions = field(default_factory=RunOptions)
    scale: ScaleOptions = field(default_factory=ScaleOptions)

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.run.allow_changed:
            known(name.replace("-", "_"), self.flat(), "setting")
        batch, splits = self.optim.batch_size, self.model.bn_splits
        if batch is not None and splits is not None and (batch % splits or batch // splits < 2):
            fitting = max(2 * splits, batch - batch % splits)
            raise ConfigError(
                f"--batch-size {batch} cannot be split into {splits} equal groups of 2 or more for batch norm: "
                f"use --batch-size {fitting} or --bn-splits 1"
            )

    def flat(self) -> dict[str, Any]:
        """All fields and their values, without the groups."""
        return {name: value for group in group_types(RunConfig) for name, value in vars(getattr(self, group)).items()}

    def replace(self, **values: Any) -> Self:
        """A copy with these fields changed; names are without groups. Raises ConfigError."""
        for name in values:
            known(name, self.flat(), "field")
        changed = {}
        for group in group_types(RunConfig):
            in_group = {name: value for name, value in values.items() if name in vars(getattr(self, group))}
            changed[group] = dataclasses.replace(getattr(self, group), **in_group)
        return type(self)(**changed)

    def to_json(self) -> str:
        """The configuration as indented JSON; tuples become lists."""
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
    | {"check", "tune", "lr_scaling", "gpus", "dist_timeout", "paranoid", "cpu_threads", "bad_images"}
    | {"allow_changed", "allow_changed_data", "allow_large_queue"}
)
"""Fields that may change when a run is resumed: they affect the weights by rounding at most, or permit something."""


def differences(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """All fields that differ, as (field, value in a, value in b), in the order of --help."""
    other = b.flat()
    return [(name, value, other[name]) for name, value in a.flat().items() if value != other[name]]
