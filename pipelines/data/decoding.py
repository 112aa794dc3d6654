"""How the pixels of a file become an image, where a user has a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Truncated = Literal["error", "accept"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """The choices of `decode.decode`.

    value_range  (low, high), low < high: in images of more than 8 bits a channel low and less become 0, high and more
                 255, and values between them what lies between. Images of 8 bits or fewer are unchanged. None: white is
                 the largest value of the type (65535 for 16 bits), and types without one are refused
    truncated    for images whose last pixels are missing: an error, or decode what is there
    channels     C of every image. With 3, grey is repeated and alpha dropped; with 1, colours become grey; any other
                 number is that of the bands in the files, in which alpha counts
    """

    value_range: tuple[float, float] | None = None
    truncated: Truncated = "error"
    channels: int = 3


DEFAULT = Decoding()
