"""Backends by name: the one list behind flags, help, errors and construction.

A value is "module:attribute", imported on first use, so that the command line knows all names without loading any
backend. To add a backend, write its module and add it to BACKENDS.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """How images become crops on the device.

    source    a `pipelines.views.CropSource`, called with (index, side, device, workers)
    pipeline  a `pipelines.backends.select.Pipeline` that makes the views itself, called with (index, planner, side,
              device, dtype, workers); None for the common `TwoViewPipeline` over the source
    only_rgb  whether it reads images of three channels only
    """

    source: str
    pipeline: str | None = None
    only_rgb: bool = False


BACKENDS = {
    "resident": Backend("pipelines.backends.resident:ResidentCrops"),
    "torch": Backend("pipelines.backends.torch:TorchCrops"),
    "dali": Backend("pipelines.backends.dali:DaliCrops", only_rgb=True),
    "ffcv": Backend("pipelines.backends.ffcv:FfcvCrops", only_rgb=True),
    # evaluated through the crops of `torch`
    "dataloader": Backend(
        "pipelines.backends.torch:TorchCrops", "pipelines.backends.baseline:DataLoaderPipeline", only_rgb=True
    ),
}
"""The values of `--pipeline`."""


def load(target: str) -> Any:
    """The attribute behind "module:attribute"."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
