"""Pictures as PNG files, complete or absent, with a note by which they are not taken for images of a data set."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipelines.data.own_outputs import SOFTWARE
from pipelines.files import write_atomically


def save_figure(figure: Figure, path: Path) -> None:
    """Write a plot. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": SOFTWARE})
    write_atomically(path, buffer.getvalue(), shared=True)


def save_image(image: Image, path: Path) -> None:
    """Write an image. Raises OSError."""
    buffer = io.BytesIO()
    note = PngInfo()
    note.add_text("Software", SOFTWARE)
    image.save(buffer, "PNG", pnginfo=note)
    write_atomically(path, buffer.getvalue(), shared=True)


def shown_bands(images: Tensor) -> Tensor:
    """(B, C, H, W) → (B, 3, H, W), for pictures: the first three of the channels, or one of them as grey."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
