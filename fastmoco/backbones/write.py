"""Export of a backbone to a file for another library, verified by loading it back and comparing features.

B batch · S side of a view · D features
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.backbones.formats import Model, format_of
from fastmoco.backbones.options import check_path
from fastmoco.backbones.read import LoadedBackbone
from fastmoco.errors import CheckpointError, ConfigError, cannot_write
from fastmoco.registry import EXPORT_TARGETS
from pipelines.files import replacing

IMAGES = 16  # for the comparison
TOLERANCE = 1e-5  # relative to the largest feature, absolute if all are below 1


class Exported(NamedTuple):
    """An exported file that has been verified.

    apart         largest difference between features, in the units of TOLERANCE
    checked_with  library that loaded the file
    """

    path: Path
    size_bytes: int
    apart: float
    checked_with: str


def export(backbone: LoadedBackbone, target: str, path: Path, *, overwrite: bool = False) -> Exported:
    """Write the backbone for `target`, a key of `fastmoco.registry.EXPORT_TARGETS`.

    The file is renamed to `path` only after the model loaded back from it gives the features of the backbone for 16
    images, up to TOLERANCE (see `_compare`). After any failure `path` is unchanged and no other file is left.

    Raises ConfigError for a wrong suffix, an existing file or link, a failed write, or a backbone that `target` has no
    model for. Raises CheckpointError if the features differ or the disk is full, BackendMissingError if ONNX is not
    installed.
    """
    kind = format_of(target)
    check_path(target, path, overwrite=overwrite)
    if reason := kind.refusal(backbone):
        supported = [name for name in EXPORT_TARGETS if not format_of(name).refusal(backbone)]
        raise ConfigError(f"{target} builds no {reason}: use --to {' or '.join(supported)}")
    content = kind.write(backbone, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, len(content), shared=True) as temporary:
            temporary.write_bytes(content)
            model, checked_with = kind.load(backbone, temporary)
            apart = _compare(backbone, model, f"{path} was not written: what {checked_with} makes of it")
    except OSError as error:
        raise cannot_write(path, error) from error
    return Exported(path, len(content), apart, checked_with)


@torch.inference_mode()
def _compare(backbone: LoadedBackbone, model: Model, subject: str) -> float:
    """max |actual − expected| / max(1, |expected|) over the features of 16 images.

    Raises CheckpointError above TOLERANCE, unless the difference is float32 rounding, which an undertrained model can
    amplify: then the model is about as close to the features in float64 as the backbone itself. The message starts with
    `subject`.
    """
    images = torch.randn(
        IMAGES, backbone.channels, backbone.side, backbone.side, generator=torch.Generator().manual_seed(0)
    )
    expected, actual = backbone.module(images), model(images)
    if actual.shape != expected.shape:
        raise CheckpointError(f"{subject} gives features {list(actual.shape)}, expected {list(expected.shape)}")
    apart = _max_abs(actual - expected) / max(1.0, _max_abs(expected))
    if not apart <= TOLERANCE:  # also if NaN
        exact = copy.deepcopy(backbone.module).double()(images.double())
        if not _max_abs(actual - exact) <= 2 * _max_abs(expected - exact):
            raise CheckpointError(
                f"{subject} gives features that are {apart:.1e} off, at most {TOLERANCE:.0e} expected"
            )
    return apart


def _max_abs(values: Tensor) -> float:
    return float(values.abs().max())
