"""Options of `fastmoco eval`, validated before any file is read. Imports no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import require
from fastmoco.config.choices import KnnSpace
from fastmoco.config.flags import REPEATED
from fastmoco.errors import ConfigError
from fastmoco.evaluation.extraction_options import ExtractionOptions
from fastmoco.evaluation.settings import FINE_TUNE, Amount, Schedule, Sgd
from fastmoco.model.architectures import check_wanted
from pipelines.suggest import closest

PROBES = ("knn", "linear", "logistic", "few-label", "fine-tune")
DEFAULT_PROBES = ("knn", "linear")
DEFAULT_LABELS = "1%,10%"
Method = Literal["tsne", "umap"]

DESCRIPTION = (
    "Evaluate a backbone: weighted kNN, linear probe, logistic regression and few-label probe on frozen features, "
    "fine-tuning, and, without labels, alignment, uniformity, effective rank and a collapse diagnosis. Features are "
    "extracted once and cached. Metrics go to eval.json, pictures to the same folder."
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ExtractionOptions):
    """Backbone, images, probes and their hyperparameters."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Folder of a run, or a file with a ResNet in it: a checkpoint of any trainer, a state dict."""
    data: Annotated[tuple[str, ...], REPEATED] = ()
    """Folder of images, list file, archives or name (None: the data of the run). Can be repeated."""
    probes: str | None = None
    """Probes, of knn,linear,logistic,few-label,fine-tune (None: knn,linear; none for data without labels)."""
    labels: str | None = None
    """Label amounts of the few-label probe, e.g. 1%,10%,5-per-class (None: 1%,10%)."""
    label_seeds: int = 5
    """Random draws of labels per amount, for mean and standard deviation."""
    knn_k: int | None = None
    """k of the weighted kNN classifier (None: 200, or the size of a smaller bank)."""
    knn_t: float = 0.1
    """Temperature of the weighted kNN classifier."""
    knn_on: KnnSpace = "both"
    """Where kNN finds neighbours: backbone features, the encoder's output as in the CIFAR demo, or both."""
    linear_lr: float = 30.0
    """Learning rate of the linear probe."""
    linear_epochs: int = 100
    """Epochs of the linear probe."""
    linear_batch_size: int = 256
    """Batch size of the linear probe."""
    linear_wd: float = 0.0
    """Weight decay of the linear probe, of weights and biases."""
    linear_momentum: float = 0.9
    """SGD momentum of the linear probe."""
    linear_normalize: bool = False
    """Divide the features of the linear probe by their L2 norm, as lightly's tutorial does."""
    linear_schedule: Schedule = "step"
    """Learning rate schedule of the linear probe; step divides by 10 after 60 and 80 % of the epochs."""
    linear_views: Literal["center", "padded", "resized"] = "center"
    """Views of the linear probe: centre crop (extracted once), or per epoch a padded or a resized random crop."""
    logistic_c: float | None = None
    """Inverse regularisation strength C of logistic regression (None: tuned on a held-out tenth; few-label: 1)."""
    fine_tune_lr: float = FINE_TUNE.lr
    """Learning rate of the backbone in fine-tuning; ten times as large for the classifier."""
    fine_tune_epochs: int = FINE_TUNE.epochs
    """Epochs of fine-tuning."""
    fine_tune_batch_size: int = FINE_TUNE.batch_size
    """Batch size of fine-tuning."""
    map: Method = "tsne"
    """Projection of the embedding plot feature_map.png; umap needs the package umap-learn."""
    pictures: bool = True
    """Draw nearest neighbours, the embedding plot and confusion matrices."""
    out: str | None = None
    """Output folder (None: eval/ in the folder of the run, or runs/eval-NAME for a file)."""
    seed: int = 0
    """Random seed of the probes: data order, initial weights, label draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("run", "out"):
            require(self, name, lambda v: v != "" and "\0" not in v, "a path or a name")
        positive = ("knn_k", "label_seeds", "linear_epochs", "linear_batch_size", "fine_tune_epochs")
        for name in positive:
            require(self, name, lambda v: v > 0, "1 or more")
        require(self, "fine_tune_batch_size", lambda v: v >= 2, "2 or more", "batch norm needs more than one image")
        for name in ("linear_lr", "fine_tune_lr", "knn_t", "logistic_c"):
            require(self, name, lambda v: v > 0, "a number above 0")
        require(self, "linear_wd", lambda v: v >= 0, "0 or more")
        require(self, "linear_momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1")
        require(self, "seed", lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295")
        if self.labels is not None and self.probes is not None and "few-label" not in self.selected_probes:
            raise ConfigError("--labels is for the few-label probe: add few-label to --probes, or remove --labels")
        _ = self.selected_probes, self.amounts

    @property
    def selected_probes(self) -> tuple[str, ...]:
        """The selected probes in canonical order; without --probes, those for a data set with labels."""
        if self.probes is None:
            return (*DEFAULT_PROBES, "few-label") if self.labels is not None else DEFAULT_PROBES
        names = [name.strip() for name in self.probes.split(",")]
        for name in names:
            if name not in PROBES:
                raise ConfigError(
                    f"--probes has {name!a}; did you mean {closest(name, PROBES)}? (known: {', '.join(PROBES)})"
                )
        return tuple(probe for probe in PROBES if probe in names)

    @property
    def amounts(self) -> list[Amount]:
        """Label amounts of the few-label probe."""
        return [Amount.parse(text) for text in (self.labels or DEFAULT_LABELS).split(",")]

    @property
    def linear_sgd(self) -> Sgd:
        return Sgd(
            lr=self.linear_lr,
            epochs=self.linear_epochs,
            batch_size=self.linear_batch_size,
            schedule=self.linear_schedule,
            momentum=self.linear_momentum,
            weight_decay=self.linear_wd,
            normalize=self.linear_normalize,
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
    """Parse the arguments of `fastmoco eval`. Raises ConfigError; exits for --help."""
    options = parse(EvalOptions, argv, command="eval", description=DESCRIPTION)
    if options.pictures:
        check_method(options.map)
    check_wanted(options.arch, options.stem, options.crop_size)
    return options


def check_method(method: Method) -> None:
    """Raise ConfigError if the package of a projection method is missing."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError("--map umap needs a package that is not installed: pip install umap-learn, or --map tsne")
