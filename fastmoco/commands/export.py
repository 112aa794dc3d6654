"""`fastmoco export`: the backbone of a run in the format of another library."""

from __future__ import annotations

import shlex

from fastmoco.backbones.detectron2 import detectron2_settings
from fastmoco.backbones.formats import call_in, loads_whole
from fastmoco.backbones.options import ExportOptions
from fastmoco.backbones.read import LoadedBackbone, read_backbone
from fastmoco.backbones.write import IMAGES, export
from fastmoco.console import Fact, make_console, show_result, shown_path
from fastmoco.registry import TIMM_PREFIX


def export_command(options: ExportOptions) -> None:
    """Export a backbone and print a summary. Raises what `read_backbone` and `export` raise."""
    path = options.path
    backbone = read_backbone(options.run, prefix=options.prefix)
    exported = export(backbone, options.to, path, overwrite=options.overwrite)
    facts = [
        Fact("from", backbone.origin),
        Fact("backbone", describe(backbone), f"views of {backbone.side} pixels"),
        Fact("normalisation", f"mean {_format(backbone.mean)}, std {_format(backbone.std)}"),
        Fact(
            "checked",
            f"the features of {IMAGES} images agree to {max(exported.apart, 1e-7):.0e}",
            exported.checked_with,
        ),
        Fact("written", str(path), f"{exported.size_bytes / 2**20:.1f} MiB"),
        Fact("load it", load_lines(backbone, options.to, shown_path(path))),
    ]
    show_result(
        make_console(),
        "fastmoco export",
        facts,
        out=str(path),
        to=options.to,
        arch=backbone.arch,
        feature_dim=backbone.feature_dim,
        side=backbone.side,
        mean=backbone.mean,
        std=backbone.std,
        largest_difference=exported.apart,
    )


def describe(backbone: LoadedBackbone) -> str:
    """`resnet18 with the CIFAR stem at width 0.25, 128 features`."""
    stem = " with the CIFAR stem" if backbone.stem == "cifar" else ""
    width = "" if backbone.width == 1 else f" at width {backbone.width:g}"
    return f"{backbone.arch}{stem}{width}, {backbone.feature_dim:,} features"


def load_lines(backbone: LoadedBackbone, target: str, name: str) -> str:
    """Code that loads the file: Python, a shell command, or for detectron2 the options of its train_net.py.

    Python code runs as it is, except that `batch`, the images for ONNX, must be defined.
    """
    if target == "timm" and loads_whole(backbone):
        model = backbone.arch.removeprefix(TIMM_PREFIX)
        channels = f", in_chans={backbone.channels}" if backbone.channels != 3 else ""
        return f"import timm; model = timm.create_model({model!r}, checkpoint_path={name!r}, num_classes=0{channels})"
    if target in ("torchvision", "timm"):
        return _load_state(backbone, target, name)
    if target == "detectron2":
        settings = {"MODEL.WEIGHTS": name, **detectron2_settings(backbone)}
        return shlex.join(str(text) for setting in settings.items() for text in setting)
    return {
        "lincls": f"python main_lincls.py -a {backbone.arch} --pretrained {shlex.quote(name)} DATA",
        "safetensors": f"import fastmoco; backbone, preprocess = fastmoco.load_backbone({name!r})",
        "onnx": "import onnxruntime; "
        f"features = onnxruntime.InferenceSession({name!r}).run(['features'], {{'images': batch}})[0]",
    }[target]


def _load_state(backbone: LoadedBackbone, library: str, name: str) -> str:
    model, options = call_in(library, backbone.arch)
    arguments = [f"{key}={value}" for key, value in options.items()]
    arguments += [f"in_chans={backbone.channels}"] if backbone.channels != 3 else []  # of timm: torchvision refuses
    if library == "torchvision":
        build = f"torchvision.models.{model}({', '.join(arguments)})"
    else:
        build = f"timm.create_model({', '.join([repr(model), *arguments])})"
    reader = ("safetensors.torch", "load_file") if name.lower().endswith(".safetensors") else ("torch", "load")
    lines = [
        f"import {', '.join(dict.fromkeys(['torch', reader[0], library]))}",
        f"model = {build}",
        f"model.load_state_dict({'.'.join(reader)}({name!r}), strict=False)",
    ]
    if backbone.stem == "cifar":
        lines[2:2] = [
            f"model.conv1 = torch.nn.Conv2d({backbone.channels}, 64, 3, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
    return "; ".join(lines)


def _format(colour: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in colour)
