"""What can be chosen by name, and the code behind each name: one owner for flags, help, errors and construction.

A value is "module:attribute", imported when it is first used, so that the command line knows all names at once and
loads none of the code. To add one, write its module and enter it here (docs/architecture.md says what each must offer).
Augmentation presets are in `pipelines.augment.presets`, backends in `pipelines.backends.registry`.
"""

from __future__ import annotations

from typing import NamedTuple

RESNET = "fastmoco.model.resnet:ResNetFamily"

ARCHITECTURES = {
    "resnet18": RESNET,
    "resnet34": RESNET,
    "resnet50": RESNET,
    "resnet101": RESNET,
    "resnet152": RESNET,
    "resnext50_32x4d": RESNET,
    "resnext50_32x8d": RESNET,
    "resnext101_32x8d": RESNET,
    "resnext101_64x4d": RESNET,
    "wide_resnet50_2": RESNET,
    "wide_resnet101_2": RESNET,
}
"""Backbones, `--arch`: a `fastmoco.model.family.BackboneFamily` for each."""

TIMM_PREFIX, OWN_PREFIX = "timm/", "own/"
FAMILIES = {
    TIMM_PREFIX: "fastmoco.model.timm_family:TimmFamily",
    OWN_PREFIX: "fastmoco.model.own:OwnFamily",
}
"""Backbones of other hands, `--arch PREFIX/NAME`: a `fastmoco.model.family.NamedFamily` of all names with a prefix."""

STEMS = ("imagenet", "cifar")
"""First layers of a backbone, `--stem`."""

OBJECTIVES = {
    "info-nce": "fastmoco.step.info_nce:InfoNCE",
}
"""Losses, `--objective`: a `fastmoco.step.objective.Objective` for each."""

OPTIMIZERS = {
    "sgd": "fastmoco.step.sgd_ema:MomentumUpdate",
}
"""Updates of both encoders, `--optimizer`: a `fastmoco.step.optimizer.Optimizer` for each."""

KERNELS = ("torch", "triton", "triton-fused")
"""Implementations of batch norm, loss and update, `--kernels`; the last also of the 1×1 convolutions in bottlenecks."""


class ExportTarget(NamedTuple):
    """suffixes, what the name of its file may end with; format, the `fastmoco.backbones.formats.Format` behind it."""

    suffixes: tuple[str, ...]
    format: str


EXPORT_TARGETS = {
    "torchvision": ExportTarget((".pth", ".safetensors"), "fastmoco.backbones.formats:TORCHVISION"),
    "timm": ExportTarget((".pth", ".safetensors"), "fastmoco.backbones.formats:TIMM"),
    "detectron2": ExportTarget((".pkl",), "fastmoco.backbones.formats:DETECTRON2"),
    "lincls": ExportTarget((".pth.tar", ".pth"), "fastmoco.backbones.formats:LINCLS"),
    "safetensors": ExportTarget((".safetensors",), "fastmoco.backbones.formats:SAFETENSORS"),
    "onnx": ExportTarget((".onnx",), "fastmoco.backbones.formats:ONNX"),
}
"""Libraries and formats a backbone is exported to, `--to`."""

COMMAND_OPTIONS = {
    "train": "fastmoco.config:RunConfig",
    "recipes": "",
    "sweep": "fastmoco.config:RunConfig",
    "export": "fastmoco.backbones.options:ExportOptions",
    "scan": "fastmoco.commands.scan_options:ScanOptions",
    "eval": "fastmoco.evaluation.options:EvalOptions",
    "report": "fastmoco.commands.report_options:ReportOptions",
    "embed": "fastmoco.evaluation.embed_options:EmbedOptions",
    "watch": "fastmoco.commands.watch_options:WatchOptions",
    "views": "fastmoco.commands.views_options:ViewsOptions",
    "doctor": "fastmoco.commands.doctor_options:DoctorOptions",
    "completion": "",
}
"""Commands, in the order of `fastmoco --help`: the dataclass of the options of each, for shell completion; or none."""
