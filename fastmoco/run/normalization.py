"""Mean and standard deviation of the images of a run: as measured by `fastmoco scan`, or of some of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmoco.errors import ConfigError
from pipelines.data import manifest
from pipelines.data.decode import printable
from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.index import ImageIndex
from pipelines.data.names import NAMES
from pipelines.data.notes import evenly_spaced
from pipelines.data.scan import channel_histogram, mean_and_std
from pipelines.errors import DataError
from pipelines.files import absolute

SAMPLED = 256
_DIGITS = 4  # as `fastmoco scan` prints them, so that --mean and --std with those numbers are the same run

Channels = tuple[float, ...]


def sampled_normalization(images: ImageIndex) -> tuple[Channels, Channels, int]:
    """Mean and std of each channel of up to SAMPLED images, evenly spaced, of values from 0 to 1, and their number.

    Raises ConfigError if a channel has one value in all of them.
    """
    histogram, count = np.zeros((images.channels, 256), dtype=np.int64), 0
    for i in evenly_spaced(len(images), SAMPLED):
        try:
            pixels = images.read(i)
        except DataError:  # reported when it is read for training
            continue
        histogram += channel_histogram(pixels)
        count += 1
    if not count:
        raise ConfigError("none of the images that were tried can be read: give --mean and --std")
    mean, std = (tuple(round(value, _DIGITS) for value in values) for values in mean_and_std(histogram))
    if min(std) <= 0:
        band = 1 + std.index(min(std))
        alpha = " (an opaque alpha channel?)" if images.channels in (2, 4) and band == images.channels else ""
        raise ConfigError(
            f"channel {band} of {images.channels} has one value in all of {count:,} images{alpha}: use fewer "
            "--channels, or give --mean and --std"
        )
    return mean, std, count


def scanned_normalization(
    data: Sequence[str], data_root: str, decoding: Decoding = DEFAULT
) -> tuple[Channels, Channels]:
    """Mean and std of each channel of the training images, of values from 0 to 1.

    data      folders or lists, as in --data
    decoding  how these are read, which the scan must have done too

    Raises ConfigError for images that have not been scanned or are all of one colour, DataError for a damaged manifest.
    """
    total = None
    for name in data:
        path = absolute(name)
        if name in NAMES and not os.path.exists(path):
            raise ConfigError(
                f"--normalization scan is for folders and lists of images, not for {name}: give --mean and --std"
            )
        found = manifest.find(path, Path(data_root).expanduser()) if os.path.exists(path) else None
        if found is None or not found.histogram.any():
            raise ConfigError(
                f"--normalization scan needs the mean and std of {printable(name)}, which has not been scanned: run "
                f"fastmoco scan {printable(name)} first, or give --mean and --std"
            )
        if (found.decoding.channels, found.decoding.value_range) != (decoding.channels, decoding.value_range):
            flags = _flags(decoding)
            raise ConfigError(
                f"--normalization scan needs the mean and std of {printable(name)} as it is read now, and it was "
                f"scanned {_flags(found.decoding) or 'without --channels and --value-range'}: run fastmoco scan "
                f"{printable(name)}{' ' * bool(flags)}{flags} again"
            )
        total = found.histogram if total is None else total + found.histogram
    assert total is not None
    mean, std = (tuple(round(value, _DIGITS) for value in values) for values in mean_and_std(total))
    if min(std) <= 0:
        raise ConfigError(f"--normalization scan: the images have a std of {min(std):g}: give --mean and --std")
    return mean, std


def _flags(decoding: Decoding) -> str:
    """The flags that decode so: `--channels 4 --value-range 0 4095`; empty for the defaults."""
    flags = [f"--channels {decoding.channels}"] if decoding.channels != DEFAULT.channels else []
    if decoding.value_range is not None:
        flags.append(f"--value-range {decoding.value_range[0]:.10g} {decoding.value_range[1]:.10g}")
    return " ".join(flags)
