"""Fingerprint of the images that a run was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from fastmoco.run.data_record import DataRecord, Difference
from pipelines.data.index import STORED, ImageIndex


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


def identity(images: ImageIndex, record: DataRecord | None) -> dict[str, Any]:
    """What the weights depend on, without labels, as hashes, and how the images are stored.

    count   number of images
    sizes   heights and widths, in order
    names   of files, without folders; None for images that are not in files of their own
    pixels  of images in memory; else None
    sample  bytes of the images that `record` samples; None for images in memory
    stored  one of `STORED`
    """
    names = None if images.paths is None else "\0".join(map(os.path.basename, images.paths))
    return {
        "count": len(images),
        "sizes": _hash(images.sizes.tobytes()),
        "names": None if names is None else _hash(os.fsencode(names)),
        "pixels": None if images.pixels is None else _hash(images.pixels.tobytes()),
        "sample": None if record is None else _hash(record.sampled.tobytes()),
        "stored": images.stored,
    }


def is_identity(value: Any) -> bool:
    """Whether a value from a file has the form of an `identity`."""
    fields = {"count", "sizes", "names", "pixels", "sample", "stored"}
    if not isinstance(value, dict) or value.keys() != fields or value["stored"] not in STORED:
        return False
    optional = all(isinstance(value[name], str | None) for name in ("names", "pixels", "sample"))
    return type(value["count"]) is int and isinstance(value["sizes"], str) and optional


def other_images(now: Mapping[str, Any], before: Mapping[str, Any]) -> Difference:
    """How images differ from others by their identities; empty if they are the same as far as these tell."""
    if now["count"] != before["count"]:
        return Difference(f"the images are {now['count']:,} and were {before['count']:,}")
    if now["sizes"] != before["sizes"]:
        return Difference("the images have other sizes in pixels, or another order")
    if now["pixels"] != before["pixels"] and now["stored"] == before["stored"]:
        return Difference("the images have other pixels")
    if None not in (now["names"], before["names"]) and now["names"] != before["names"]:
        return Difference("the images have other file names, or another order")
    if now["stored"] == before["stored"]:
        return Difference()
    stored = f"the images are {now['stored']} and were {before['stored']}"
    if now["sample"] is None or now["sample"] != before["sample"]:
        return Difference(f"{stored}, with other bytes, so that they cannot be compared")
    return Difference(note=f"{stored}: their sizes and a sample of their contents were compared, which are the same")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
