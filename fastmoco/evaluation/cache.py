"""Features that were extracted once, kept on disk under a name that says everything they depend on.

A file is a safetensors of one tensor, `features` (N, D) float32, in `features/` below the data root. Its name is a hash
of the backbone's weights, of the images and of the preprocessing, so that a file is right or not there: nothing has to
be compared or declared out of date. The least recently used ones go when all together exceed `MOST_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmoco.files import sync
from fastmoco.run.fingerprint import fingerprint
from pipelines.data.index import ImageIndex
from pipelines.data.manifest import file_stats

FORMAT = 1  # to be raised when the same backbone, images and preprocessing give other features
MOST_BYTES = 32 * 2**30
_FREE_SHARE = 0.5  # of the free space a file may take


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all parameters and buffers, on whatever device they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def images_hash(index: ImageIndex) -> str:
    """SHA-256 that changes with any image: files by path, bytes and time of modification, arrays by their content."""
    digest = hashlib.sha256(fingerprint(index).encode())
    if index.paths is not None:
        digest.update(file_stats(index.paths).tobytes())
        for path in index.paths:
            digest.update(os.fsencode(path) + b"\0")
    if index.records is not None:
        digest.update(file_stats(index.records.paths).tobytes() + b"\0".join(map(os.fsencode, index.records.paths)))
        digest.update(index.records.offsets.tobytes())
    return digest.hexdigest()


def key(weights: str, images: str, preprocessing: Mapping[str, Any]) -> str:
    """The name of a file: 32 hexadecimal digits of all three. `preprocessing` holds what JSON can."""
    parts = [FORMAT, weights, images, dict(sorted(preprocessing.items()))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class FeatureCache:
    """The files in a folder, which is made when something is stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, rows: int, columns: int) -> Tensor | None:
        """(rows, columns) float32 on the CPU, or None where there is no such file or it is damaged."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                found = file.get_slice("features")
                if (list(found.get_shape()), found.get_dtype()) != ([rows, columns], "F32"):
                    return None
                features = file.get_tensor("features").clone()  # own memory, not the mapped file
            os.utime(path)  # used now
        except (OSError, SafetensorError):
            return None
        return features

    def store(self, name: str, features: Tensor) -> str | None:
        """Keeps them for later, whole or not at all; returns a line in words where the disk does not allow it."""
        path, needed = self._path(name), features.numel() * 4
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two evaluations may store the same features
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if needed > _FREE_SHARE * free:
                return f"the features are not kept: they take {needed:,} bytes and {self.folder} has {free:,} free"
            save_file({"features": features.detach().cpu().float().contiguous()}, part)
            sync(part)
            os.replace(part, path)
            self._prune(path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return f"the features cannot be kept in {self.folder} ({reason}): they are extracted again next time"
        finally:
            with suppress(OSError):
                part.unlink()
        return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _prune(self, newest: Path) -> None:
        """Deletes the least recently used files while all together are too large; never the one just written."""
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= MOST_BYTES or path == newest:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
