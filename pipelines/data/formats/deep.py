"""Images of more than 8 bits a channel: their reduction to 8 bits, and what part of their range they use.

h, w height and width as stored
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipelines.data.formats.unsupported import UnsupportedError

_SAMPLE = 100_000  # values from which quantiles are computed
_QUANTILES = (0.001, 0.999)


@dataclass(frozen=True, slots=True)
class Span:
    """The finite values of one image or of several.

    least, most  the extremes
    low, high    the 0.1 % and 99.9 % quantiles; of several images the least and the largest of theirs
    white        the largest value of the type, or None if its white is undefined
    whole        whether they are integers
    """

    least: float
    low: float
    high: float
    most: float
    white: int | None
    whole: bool

    def range(self) -> tuple[float, float]:
        """The --value-range to use: from 0 to a full number of bits if they lie there, else from low to high."""
        low, high = (self.least, self.most) if self.whole else (self.low, self.high)
        if self.whole and 0 <= low <= high / 4 and high < 2**16:
            return 0, 2 ** max(8, int(high).bit_length()) - 1
        if self.whole:
            low, high = self.low, self.high
            return math.floor(low), max(math.ceil(high), math.floor(low) + 1)
        low, high = float(f"{low:.4g}"), float(f"{high:.4g}")
        return (low, high) if low < high else (low, low + 1)

    def flags(self) -> str:
        """The range as it is given on the command line: `--value-range 0 4095`."""
        return f"--value-range {self.range()[0]:.10g} {self.range()[1]:.10g}"

    @property
    def is_small_part(self) -> bool:
        """Whether 99.8 % of the values lie in less than half of the range of their type."""
        return self.white is not None and self.high - self.low < self.white / 2


def joined(spans: list[Span]) -> Span | None:
    """The span of several images; None without any."""
    if not spans:
        return None
    whites = [span.white for span in spans]
    return Span(
        min(span.least for span in spans),
        min(span.low for span in spans),
        max(span.high for span in spans),
        max(span.most for span in spans),
        None if None in whites else max(white for white in whites if white is not None),
        all(span.whole for span in spans),
    )


class NoWhiteError(UnsupportedError):
    """Values whose white is undefined, and no value range was given. `span` is theirs."""

    def __init__(self, deep: Deep) -> None:
        self.span = deep.span()
        values = f"{self.span.least:.10g} to {self.span.most:.10g}"
        super().__init__(
            f"it holds {deep.describe()} ({values}), for which white is undefined: give the values of black and white, "
            f"as in {self.span.flags()}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Deep:
    """Values of more than 8 bits.

    values    (h, w) grey, (h, w, 3) red, green, blue or (h, w, c) other bands; integers or floats of any size
    white     the value of white, or None if the type has none: then a value range is needed
    inverted  whether 0 is white (TIFF's WhiteIsZero)
    """

    values: np.ndarray
    white: int | None
    inverted: bool = False

    def rgb(self, value_range: tuple[float, float] | None) -> np.ndarray:
        """(h, w, 3) uint8: `bands`, with grey three times."""
        bands = self.bands(value_range)
        return bands if bands.shape[2] == 3 else np.repeat(bands, 3, axis=2)

    def bands(self, value_range: tuple[float, float] | None) -> np.ndarray:
        """(h, w, c) uint8: the high byte, or `value_range` mapped to 0..255, rounded, clipped; NaN becomes 0.

        Raises NoWhiteError without a white and a value range.
        """
        if value_range is not None:
            grey = _mapped(self.values, *value_range)
        elif self.white is None:
            raise NoWhiteError(self)
        else:
            grey = _high_byte(self.values, self.white)
        if self.inverted:
            grey = 255 - grey
        return grey if grey.ndim == 3 else grey[..., None]

    def describe(self) -> str:
        kind = self.values.dtype.kind
        bits = 8 * self.values.dtype.itemsize
        if kind == "f":
            return f"{bits}-bit floats"
        return f"{bits}-bit {'signed ' if kind == 'i' else ''}integers"

    def span(self) -> Span:
        """The range of the values, quantiles from at most `_SAMPLE` of them. All zero if none is finite."""
        flat = self.values.reshape(-1)
        if flat.dtype.kind == "f":
            flat = flat[np.isfinite(flat)]
        if not flat.size:
            return Span(0, 0, 0, 0, self.white, self.values.dtype.kind != "f")
        low, high = np.quantile(flat[:: -(-flat.size // _SAMPLE)].astype(np.float64), _QUANTILES, method="nearest")
        whole = flat.dtype.kind != "f"
        return Span(float(flat.min()), float(low), float(high), float(flat.max()), self.white, whole)


def _high_byte(values: np.ndarray, white: int) -> np.ndarray:
    bits = white.bit_length()
    if white == 2**bits - 1:
        return (values >> (bits - 8)).astype(np.uint8)
    scaled = (np.minimum(values, white).astype(np.int64) * 65_535 + white // 2) // white
    return (scaled >> 8).astype(np.uint8)


def _mapped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values low to high → 0 to 255, uint8."""
    if values.dtype in (np.uint16, np.int16):  # by a table of all values
        table = _linear(np.arange(65_536, dtype=np.uint16).view(values.dtype), low, high)
        return table[values.view(np.uint16)]
    return _linear(values, low, high)


def _linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        levels = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(np.clip(np.nan_to_num(levels, nan=0, posinf=255, neginf=0), 0, 255) + 0.5).astype(np.uint8)
