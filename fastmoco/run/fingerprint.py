"""Fingerprint of the images that a run was trained on."""

from __future__ import annotations

import hashlib
import os

from pipelines.data.index import ImageIndex


def fingerprint(images: ImageIndex) -> str:
    """`N images, HASH`, over file names, sizes and labels, and pixels if they are in memory."""
    digest = hashlib.sha256(images.sizes.tobytes())
    if images.labels is not None:
        digest.update(images.labels.tobytes())
    if images.pixels is not None:
        digest.update(images.pixels.tobytes())
    for path in images.paths or ():
        digest.update(os.fsencode(os.path.basename(path)) + b"\0")
    return f"{len(images):,} images, {digest.hexdigest()[:16]}"
