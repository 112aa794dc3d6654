"""A backbone into a file for another library, which is kept only if what is loaded back gives the same features.

B batch · S side of a view · D features
"""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.export.formats import Model, format_of
from fastmoco.export.options import check_path
from fastmoco.export.read import LoadedBackbone
from fastmoco.files import sync, temporary
from fastmoco.registry import EXPORT_TARGETS

IMAGES = 16
TOLERANCE = 1e-5  # of the largest feature, or absolute where no feature is larger than 1


class Exported(NamedTuple):
    """path, size_bytes; apart, as TOLERANCE the largest difference of a feature; checked_with, what loaded the file."""

    path: Path
    size_bytes: int
    apart: float
    checked_with: str


def export(backbone: LoadedBackbone, target: str, path: Path, *, overwrite: bool = False) -> Exported:
    """Writes the backbone for `target`, a key of `fastmoco.registry.EXPORT_TARGETS`.

    The file gets its name only after the features of 16 images, computed by what was loaded back from the disk, agree
    with the backbone's to TOLERANCE (see `_compare`). Until then, and after any failure, what was there before stays,
    and nothing else.

    Raises ConfigError: a wrong suffix, a file or link that is in the way, a disk that refuses, a backbone that the
    target has no model for. Raises CheckpointError where the features differ, and BackendMissingError where ONNX is
    asked for and not installed.
    """
    kind = format_of(target)
    check_path(target, path, overwrite=overwrite)
    if reason := kind.refusal(backbone):
        fitting = [name for name in EXPORT_TARGETS if not format_of(name).refusal(backbone)]
        raise ConfigError(f"{target} builds no {reason}: use --to {' or '.join(fitting)}")
    content = kind.write(backbone, path.name)
    part = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # never through a link that somebody left there
            file.write(content)
        sync(part)
        model, checked_with = kind.load(backbone, part)
        apart = _compare(backbone, model, f"{path} was not written: what {checked_with} makes of it")
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror or error}): choose another with --out") from error
    finally:
        with suppress(OSError):  # an error on the way has been said already
            part.unlink()
    return Exported(path, len(content), apart, checked_with)


@torch.inference_mode()
def _compare(backbone: LoadedBackbone, model: Model, what: str) -> float:
    """max |found − expected| / max(1, |expected|) over the features of 16 images.

    Raises CheckpointError above TOLERANCE, unless it is the rounding of float32: a model of few steps can magnify that,
    and another order of summation is then as far from the features in float64 as the backbone's own order is.
    """
    images = torch.randn(IMAGES, 3, backbone.side, backbone.side, generator=torch.Generator().manual_seed(0))
    expected, found = backbone.module(images), model(images)
    if found.shape != expected.shape:
        raise CheckpointError(f"{what} gives features {list(found.shape)}, expected {list(expected.shape)}")
    apart = _largest(found - expected) / max(1.0, _largest(expected))
    if not apart <= TOLERANCE:  # so that NaN is refused
        exact = copy.deepcopy(backbone.module).double()(images.double())
        if not _largest(found - exact) <= 2 * _largest(expected - exact):
            raise CheckpointError(f"{what} gives features that are {apart:.1e} off, at most {TOLERANCE:.0e} expected")
    return apart


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
