"""What `fastmoco eval` can be asked for, checked before anything is read."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require
from fastmoco.errors import ConfigError
from fastmoco.evaluation.settings import FINE_TUNE, Amount, Schedule, Sgd
from fastmoco.model.architectures import check_wanted
from pipelines.suggest import closest

PROBES = ("knn", "linear", "logistic", "few-label", "fine-tune")
USUAL_PROBES = ("knn", "linear")
USUAL_LABELS = "1%,10%"
Method = Literal["tsne", "umap"]

DESCRIPTION = (
    "Evaluate frozen features: weighted kNN, linear probe, logistic regression, few labels, fine-tuning, "
    "and, without labels, alignment, uniformity, effective rank and whether they have collapsed. Features are "
    "extracted once and kept. Numbers go to eval.json, pictures beside it."
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Which backbone, on which images, by which probes."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """The folder of a run, or a file: a checkpoint, a backbone, the authors' .pth.tar, torchvision's state dict."""
    data: str | None = None
    """A folder of images, a list of paths, or a name such as cifar10 (None: what the run was trained on)."""
    probes: str | None = None
    """Any of knn,linear,logistic,few-label,fine-tune (None: knn,linear; without labels none of them)."""
    labels: str | None = None
    """Labels of the few-label probe, as in 1%,10%,5-per-class (None: 1%,10%)."""
    label_seeds: int = 5
    """Draws of the labelled images, for mean and spread."""
    knn_k: int | None = None
    """Neighbours that vote (None: 200, or all images of a smaller bank)."""
    knn_t: float = 0.1
    """Temperature of the votes."""
    linear_lr: float = 30.0
    """Learning rate of the linear probe."""
    linear_epochs: int = 100
    """Passes of the linear probe."""
    linear_batch_size: int = 256
    """Images a step of the linear probe."""
    linear_wd: float = 0.0
    """Weight decay of the linear probe."""
    linear_schedule: Schedule = "step"
    """Learning rate of the linear probe: divided by 10 after 60 and 80 % of the passes, or along a half cosine."""
    linear_views: Literal["center", "padded", "resized"] = "center"
    """Fit it on features of the centre, extracted once, or of new crops each pass: moved and flipped, or resized."""
    logistic_c: float | None = None
    """Strength of the labels in logistic regression (None: chosen on a held-out tenth; 1 for few labels)."""
    fine_tune_lr: float = FINE_TUNE.lr
    """Learning rate of the backbone in fine-tuning; its classifier has ten times that."""
    fine_tune_epochs: int = FINE_TUNE.epochs
    """Passes of fine-tuning."""
    fine_tune_batch_size: int = FINE_TUNE.batch_size
    """Images a step of fine-tuning."""
    arch: str | None = None
    """What the backbone has to be (None: whatever the file holds)."""
    stem: Literal["imagenet", "cifar"] | None = None
    """The first layers it has to have (None: whatever the file holds)."""
    crop_size: int | None = None
    """Side of a view in pixels (None: that of the training)."""
    limit: int | None = None
    """Use this many images of each part only."""
    bad_images: Literal["error", "quarantine"] = "error"
    """What an image that cannot be read means: stop, or leave it out."""
    map: Method = "tsne"
    """How the map of the features is drawn; umap needs the package umap-learn."""
    pictures: bool = True
    """Draw neighbours, the map of the features and confusion matrices."""
    feature_cache: bool = True
    """Keep the features below --data-root, and look for them there."""
    out: str | None = None
    """Folder to write to (None: eval/ in the folder of the run, or runs/eval-NAME for a file)."""
    data_root: str = "~/.cache/fastmoco"
    """Where named data sets are downloaded to."""
    seed: int = 0
    """Seed of the probes: order, first weights, draws of labels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    amp: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the backbone's arithmetic."""
    pipeline: Literal["auto", "resident", "torch", "dali", "ffcv"] = "auto"
    """How images are decoded and cropped."""
    workers: int | None = None
    """Threads or processes that decode (None: from the number of cores and images)."""
    cpu_threads: int | None = None
    """Threads that compute on a CPU (None: as many as are fastest at the time)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("run", "data", "out"):
            require(self, name, lambda v: v != "" and "\0" not in v, "a path or a name")
        positive = ("knn_k", "label_seeds", "limit", "linear_epochs", "linear_batch_size", "fine_tune_epochs")
        for name in positive:
            require(self, name, lambda v: v > 0, "1 or more")
        require(
            self, "fine_tune_batch_size", lambda v: v >= 2, "2 or more", "batch norm has no statistics of one image"
        )
        for name in ("linear_lr", "fine_tune_lr", "knn_t", "logistic_c"):
            require(self, name, lambda v: v > 0, "a number above 0")
        require(self, "linear_wd", lambda v: v >= 0, "0 or more")
        require(self, "crop_size", lambda v: v >= 8, "8 pixels or more")
        require(self, "workers", lambda v: v >= 0, "0 or more")
        require(self, "cpu_threads", lambda v: 1 <= v <= 1024, "1 to 1024 threads")
        require(self, "seed", lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295")
        if self.labels is not None and self.probes is not None and "few-label" not in self.asked_probes:
            raise ConfigError("--labels is for the few-label probe: add few-label to --probes, or drop --labels")
        _ = self.asked_probes, self.amounts

    @property
    def asked_probes(self) -> tuple[str, ...]:
        """The probes in their usual order; those of a data set with labels where none were named."""
        if self.probes is None:
            return (*USUAL_PROBES, "few-label") if self.labels is not None else USUAL_PROBES
        words = [word.strip() for word in self.probes.split(",")]
        for word in words:
            if word not in PROBES:
                raise ConfigError(
                    f"--probes has {word!a}; did you mean {closest(word, PROBES)}? (known: {', '.join(PROBES)})"
                )
        return tuple(probe for probe in PROBES if probe in words)

    @property
    def amounts(self) -> list[Amount]:
        """How many labels the few-label probe uses, in turn."""
        return [Amount.parse(word) for word in (self.labels or USUAL_LABELS).split(",")]

    @property
    def linear_sgd(self) -> Sgd:
        return Sgd(
            lr=self.linear_lr,
            epochs=self.linear_epochs,
            batch_size=self.linear_batch_size,
            schedule=self.linear_schedule,
            weight_decay=self.linear_wd,
        )

    @property
    def fine_tune_sgd(self) -> Sgd:
        return Sgd(
            lr=self.fine_tune_lr,
            epochs=self.fine_tune_epochs,
            batch_size=self.fine_tune_batch_size,
            schedule=FINE_TUNE.schedule,
            weight_decay=FINE_TUNE.weight_decay,
        )


def parse_eval(argv: list[str]) -> EvalOptions:
    """The arguments of `fastmoco eval`. Raises ConfigError; exits for --help."""
    flags = ["--" + name.replace("_", "-") for name in EvalOptions.__dataclass_fields__ if name != "run"]
    options = parse(EvalOptions, argv, command="eval", description=DESCRIPTION, flags=flags)
    if options.pictures:
        check_method(options.map)
    check_wanted(options.arch, options.stem, options.crop_size)
    return options


def check_method(method: Method) -> None:
    """Raises ConfigError where a package is missing."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError("--map umap needs a package that is not installed: pip install umap-learn, or --map tsne")
