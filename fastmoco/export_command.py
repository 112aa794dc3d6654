"""fastmoco export: the backbone of a run as a file of another library."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmoco.arguments import parse
from fastmoco.backbone_files import Backbone, read_backbone
from fastmoco.config_checks import check_types, require
from fastmoco.console import Fact, make_console, show_facts
from fastmoco.export import IMAGES, export

DESCRIPTION = (
    "Write the backbone of a run, without its projection head, for another library. The file is loaded back and its "
    "features are compared before it gets its name."
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which backbone, for whom, and where to."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """The folder of a run, or a file: a checkpoint, a backbone, the authors' .pth.tar, torchvision's state dict."""
    to: Literal["torchvision", "timm", "detectron2", "lincls", "safetensors", "onnx"]
    """The library or format; lincls is main_lincls.py of facebookresearch/moco."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """The file to write."""
    overwrite: bool = False
    """Replace that file."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "run", lambda v: v != "" and "\0" not in v, "the folder of a run, or a file")
        require(self, "out", lambda v: v != "" and "\0" not in v, "the name of a file")


def export_command(argv: list[str]) -> None:
    """Writes, and says what was written. Raises what `read_backbone` and `export` raise."""
    flags = ["--" + name for name in ExportOptions.__dataclass_fields__ if name != "run"]
    options = parse(ExportOptions, argv, command="export", description=DESCRIPTION, flags=[*flags, "-o"])
    path = Path(os.path.abspath(os.path.expanduser(options.out)))
    backbone = read_backbone(options.run)
    done = export(backbone, options.to, path, overwrite=options.overwrite)
    facts = [
        Fact("from", backbone.origin),
        Fact("backbone", describe(backbone), f"views of {backbone.side} pixels"),
        Fact("normalisation", f"mean {_words(backbone.mean)}, std {_words(backbone.std)}"),
        Fact("checked", f"the features of {IMAGES} images agree to {max(done.apart, 1e-7):.0e}", done.checked_with),
        Fact("written", str(path), f"{done.size_bytes / 2**20:.1f} MiB"),
        Fact("load it", load_lines(backbone, options.to, os.path.relpath(path))),
    ]
    show_facts(make_console(), "fastmoco export", facts)


def describe(backbone: Backbone) -> str:
    """`resnet18 with the CIFAR stem at width 0.25, 128 features`."""
    stem = " with the CIFAR stem" if backbone.stem == "cifar" else ""
    width = "" if backbone.width == 1 else f" at width {backbone.width:g}"
    return f"{backbone.arch}{stem}{width}, {backbone.feature_dim:,} features"


def load_lines(backbone: Backbone, target: str, name: str) -> str:
    """The Python, the command or the settings that load the file."""
    restem = "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False); model.maxpool = torch.nn.Identity(); "
    read = f"safetensors.torch.load_file({name!r})" if name.endswith(".safetensors") else f"torch.load({name!r})"
    load = f"{restem if backbone.stem == 'cifar' else ''}model.load_state_dict({read}, strict=False)"
    return {
        "torchvision": f"model = torchvision.models.{backbone.arch}(); {load}",
        "timm": f"model = timm.create_model({backbone.arch!r}); {load}",
        "detectron2": f"MODEL.WEIGHTS {name} MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB "
        f"MODEL.PIXEL_MEAN [{_words(backbone.mean, 255)}] MODEL.PIXEL_STD [{_words(backbone.std, 255)}]",
        "lincls": f"python main_lincls.py -a {backbone.arch} --pretrained {name} DATA",
        "safetensors": f"backbone, preprocess = fastmoco.load_backbone({name!r})",
        "onnx": f"onnxruntime.InferenceSession({name!r}).run(['features'], {{'images': batch}})",
    }[target]


def _words(colour: tuple[float, float, float], scale: int = 1) -> str:
    return ", ".join(f"{value * scale:.6g}" for value in colour)
