"""Training, evaluation, export and loading as functions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from fastmoco import trainer
from fastmoco.api.arguments import arguments
from fastmoco.api.run import Run
from fastmoco.backbones import write
from fastmoco.backbones.options import ExportOptions, check_path
from fastmoco.backbones.preprocessing import Preprocessing
from fastmoco.backbones.read import read_backbone
from fastmoco.commands.eval import eval_command
from fastmoco.commands.train_arguments import TrainArguments, train_arguments
from fastmoco.config import RunConfig
from fastmoco.console import make_console
from fastmoco.distributed.launch import is_launched
from fastmoco.errors import ConfigError
from fastmoco.evaluation.embed_options import EmbedOptions
from fastmoco.evaluation.embeddings import Embeddings, compute, embedding
from fastmoco.evaluation.options import parse_eval
from fastmoco.model.own import own_model
from fastmoco.recipes import check_data

AnyRun = str | os.PathLike[str] | Run


def train(
    config: RunConfig | str | os.PathLike[str] | None = None, *, model: nn.Module | None = None, **settings: Any
) -> Run:
    """Pretrain a backbone with momentum contrast (MoCo), as `fastmoco train` does, and return the run.

        >>> from fastmoco import train
        >>> run = train(data="photos", arch="resnet18", crop_size=32, epochs=2, out="runs/photos")
        >>> run.status["state"]
        'done'

    A recipe of `fastmoco recipes` comes first, as in the command, and settings change it:

        >>> run = train("shapes", epochs=1, limit=64, moco_k=64, out="runs/shapes")

    A model of one's own is any module that gives features. Both encoders are made of copies of it, every `BatchNorm2d`
    in it is split as MoCo needs it, and the projection head is added; a mean is taken over what is left of height and
    width:

        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2))
        >>> run = train(model=net, data="photos", crop_size=32, epochs=1, out="runs/own")
        >>> backbone, preprocess = run.backbone()       # a copy of `net` with the trained weights
        >>> run = train(model=net, resume=run, epochs=2)

    config    a recipe, a config.json or the `config` of a run; None for settings that suit the data
    model     (B, 3, S, S) float32 images → features (B, D) or (B, D, ...); in place of `arch`
    settings  the flags of `fastmoco train --help` with underscores: lists for several values, True and False for
              switches; `resume` also takes a run

    Returns after the last epoch. Raises ConfigError, DataError, CheckpointError, DivergedError or DeviceError, with a
    message of one line; Preempted after Ctrl-C or SIGTERM, with the run saved: `train(resume=...)` goes on.
    """
    if model is not None and "arch" in settings:
        raise ConfigError(f"arch is {settings['arch']!r} and model a {type(model).__name__}: give one of the two")
    side = settings.get("crop_size")
    with own_model(model, side if isinstance(side, int) else None) as arch:
        if arch is not None:
            settings["arch"] = arch
        given = _given(config, settings)
        if given.recipe is not None:
            check_data(given.recipe, given.config)
        gpus = given.config.scale.gpus or 1
        if gpus > 1 and not is_launched():
            raise ConfigError(
                f"gpus is {gpus}, and a call trains in its own process: use fastmoco train --gpus {gpus}, or torchrun "
                "with this script"
            )
        folder = trainer.train(given.config, make_console(is_log=True), given.from_recipe)
    return Run(folder, model)


def _given(config: RunConfig | str | os.PathLike[str] | None, settings: dict[str, Any]) -> TrainArguments:
    """What the command line would have been given."""
    if isinstance(config, RunConfig):
        return TrainArguments(None, config.replace(**{name: _plain(value) for name, value in settings.items()}))
    words = []
    if config is not None:
        is_file = os.fspath(config).endswith(".json")
        words = ["--config", os.fspath(config)] if is_file else [os.fspath(config)]
    return train_arguments([*words, *arguments(settings)])


def _plain(value: Any) -> Any:
    """A setting as configurations have it: text for paths, tuples for lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def evaluate(run: AnyRun, **settings: Any) -> dict[str, Any]:
    """Evaluate the features of a run or file, as `fastmoco eval` does, and return the metrics.

        >>> from fastmoco import evaluate
        >>> metrics = evaluate("runs/shapes", probes="knn", pictures=False)
        >>> [probe["probe"] for probe in metrics["probes"]]     # on features, and on the encoder's output
        ['knn', 'knn-output']
        >>> 0 <= metrics["probes"][0]["top1_percent"] <= 100
        True

    run       a run, its folder, a checkpoint, or a file that `load_backbone` reads
    settings  the flags of `fastmoco eval --help` with underscores

    Returns the content of eval.json in the output folder: backbone, data, probes (a record for each), label_free
    (alignment, uniformity, effective rank, verdict), files, seconds, versions. Raises ConfigError, DataError,
    CheckpointError or DeviceError, with a message of one line.
    """
    options = parse_eval([os.fspath(run), *arguments(settings)])
    with own_model(run.model if isinstance(run, Run) else None):
        folder = eval_command(options)
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def export(
    run: AnyRun,
    to: str,
    path: str | os.PathLike[str] | None = None,
    *,
    prefix: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the backbone for another library, as `fastmoco export` does, and return the path of the file.

        >>> from fastmoco import export
        >>> file = export("runs/shapes", to="safetensors")
        >>> file.name
        'shapes-safetensors.safetensors'

    run        a run, its folder, a checkpoint, or a file that `load_backbone` reads
    to         torchvision, timm, detectron2, lincls, safetensors or onnx
    path       of the file (None: NAME-LIBRARY in the folder of the run NAME, or beside another file)
    prefix     which of several backbones in a file
    overwrite  replace that file

    The file is there only if the model loaded back from it gives the features of 16 images. Raises ConfigError for a
    library that does not build this backbone and for a file that exists, CheckpointError, BackendMissingError.
    """
    out = None if path is None else os.fspath(path)
    options = ExportOptions(run=os.fspath(run), to=to, out=out, prefix=prefix, overwrite=overwrite)
    check_path(options.to, options.path, overwrite=overwrite)
    with own_model(run.model if isinstance(run, Run) else None):
        backbone = read_backbone(options.run, prefix=prefix)
        return write.export(backbone, options.to, options.path, overwrite=overwrite).path


def embed(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], backbone: AnyRun, **settings: Any
) -> Embeddings:
    """The features of every image of a data set, as `fastmoco embed` writes them.

        >>> from fastmoco import embed
        >>> embeddings = embed("photos", "runs/shapes")
        >>> embeddings.features.shape, len(embeddings.paths)
        ((32, 128), 32)

    data      a folder of images, a list file, tar archives, a .beton or a name such as cifar10; or several of these
    backbone  a run, its folder, a checkpoint, or a file that `load_backbone` reads
    settings  the flags of `fastmoco embed --help` with underscores: normalize, limit, device, pipeline, crop_size, ...

    Raises ConfigError, DataError, CheckpointError, BackendMissingError or DeviceError, with a message of one line.
    """
    sources = [data] if isinstance(data, str | os.PathLike) else data
    paths = tuple(os.fspath(source) for source in sources)
    options = EmbedOptions(data=paths, backbone=os.fspath(backbone), out="embeddings.npz", **settings)
    with (
        own_model(backbone.model if isinstance(backbone, Run) else None),
        embedding(options, Console(quiet=True)) as prepared,
    ):
        features = np.empty((prepared.count, prepared.backbone.feature_dim), dtype=np.float32)
        return compute(prepared, features, normalize=options.normalize)


def load_backbone(
    path: AnyRun,
    *,
    arch: str | None = None,
    stem: str | None = None,
    side: int | None = None,
    prefix: str | None = None,
    model: nn.Module | None = None,
) -> tuple[nn.Module, Preprocessing]:
    """Load a pretrained backbone and the preprocessing of its input images.

        >>> import torch
        >>> from fastmoco import load_backbone
        >>> backbone, preprocess = load_backbone("runs/shapes")
        >>> views = torch.stack([preprocess(torch.zeros(3, 40, 40, dtype=torch.uint8))])
        >>> backbone(views).shape                               # (B, D) float32
        torch.Size([1, 128])

    path         a run, its folder, a checkpoint, a file of `fastmoco export`, or any file of torch.save or safetensors
                 with a ResNet in it, such as the checkpoints of other trainers
    arch, stem   the expected architecture and stem: anything else is an error. timm/NAME says what a file of timm is
    side         side of the views in pixels, instead of the one used in training
    prefix       which of several backbones: part of the names of its tensors, such as encoder_k or teacher; by default
                 the query, online or student network
    model        for a run of a model of one's own: such a module, of which a copy gets the weights

    The backbone is torchvision's `ResNet` with an identity as `fc`, or timm's model without its classifier, in
    evaluation mode, float32, on the CPU; the preprocessing is an `fastmoco.backbones.preprocessing.Preprocessing`.
    Raises CheckpointError or ConfigError, both ValueErrors with a message of one line.
    """
    own = model if model is not None or not isinstance(path, Run) else path.model
    with own_model(own, side) as named:
        if named is not None and arch is not None:
            raise ConfigError(f"arch is {arch!r} and model a {type(own).__name__}: give one of the two")
        backbone = read_backbone(os.fspath(path), arch=arch or named, stem=stem, side=side, prefix=prefix)
    return backbone.module, Preprocessing(backbone.side, backbone.mean, backbone.std)
