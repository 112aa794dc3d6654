"""The features of an evaluation for TensorBoard's projector: `tensorboard --logdir runs`, tab Projector.

M images, at most MOST · D features · P side of a thumbnail
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.splits import Subset
from fastmoco.run.png import save_image
from pipelines.data.decode import printable
from pipelines.data.notes import file_name
from pipelines.files import write_atomically
from pipelines.randomness import Domain, permutation

MOST = 2_000  # images: the projector's t-SNE runs in the browser
THUMBNAIL_PX = 48
_VIEWS_AT_ONCE = 128  # of 224 pixels: 77 MB as float32
_NAME = "features"


def write_projector(images: Subset, extractor: Extractor, folder: Path, *, labelled: bool) -> None:
    """Write features, paths, labels and thumbnails of up to MOST images of a subset to a folder of event files.

    projector_config.pbtxt names features.bytes, (M, D) float32, features.tsv and features.png. Raises OSError.
    """
    rows = np.sort(permutation(0, Domain.SUBSET, len(images))[:MOST])
    features = extractor.features(images)[torch.from_numpy(rows).to(extractor.device)].cpu().numpy()
    positions = images.positions[rows]
    lines = ["path\tlabel"] if labelled else []
    for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
        path = _cell(file_name(images.index, position))
        label = _cell(images.index.class_names[images.labels()[row]]) if labelled else ""
        lines.append(f"{path}\t{label}" if labelled else path)
    write_atomically(folder / f"{_NAME}.bytes", features.astype("<f4").tobytes(), shared=True)
    write_atomically(folder / f"{_NAME}.tsv", "\n".join(lines) + "\n", shared=True)
    _write_sprite(extractor, images, positions, folder / f"{_NAME}.png")
    entry = f"""embeddings {{
  tensor_name: {json.dumps(f"features of {printable(images.index.name)}")}
  tensor_shape: {features.shape[0]}
  tensor_shape: {features.shape[1]}
  tensor_path: "{_NAME}.bytes"
  metadata_path: "{_NAME}.tsv"
  sprite {{
    image_path: "{_NAME}.png"
    single_image_dim: {THUMBNAIL_PX}
    single_image_dim: {THUMBNAIL_PX}
  }}
}}
"""
    write_atomically(folder / "projector_config.pbtxt", entry, shared=True)


def _write_sprite(extractor: Extractor, images: Subset, positions: np.ndarray, path: Path) -> None:
    """All thumbnails in one square picture, row by row."""
    parts = np.array_split(positions, -(-len(positions) // _VIEWS_AT_ONCE))
    small = torch.cat([_thumbnails(extractor.pixels(images.index, part)) for part in parts])
    across = math.ceil(math.sqrt(len(small)))
    sheet = small.new_zeros(across * across, 3, THUMBNAIL_PX, THUMBNAIL_PX)
    sheet[: len(small)] = small
    tiles = sheet.view(across, across, 3, THUMBNAIL_PX, THUMBNAIL_PX).permute(0, 3, 1, 4, 2)
    side = across * THUMBNAIL_PX
    save_image(Image.fromarray(tiles.reshape(side, side, 3).round().clamp(0, 255).to(torch.uint8).numpy()), path)


def _thumbnails(pixels: Tensor) -> Tensor:
    """Views (B, S, S, 3) uint8 → (B, 3, P, P) float32."""
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    return F.interpolate(pixels.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)


def _cell(text: str) -> str:
    return printable(text).replace("\t", " ")
