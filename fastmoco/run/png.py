"""Pictures as PNG files, complete or absent."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL.Image import Image

from pipelines.files import write_atomically


def save_figure(figure: Figure, path: Path) -> None:
    """Write a plot. Raises OSError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue(), shared=True)


def save_image(image: Image, path: Path) -> None:
    """Write an image. Raises OSError."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue(), shared=True)
