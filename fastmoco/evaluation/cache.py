"""Cache of extracted features on disk, content-addressed.

Each entry is a safetensors file with one tensor, `features` (N, D) float32, in `features/` below the data root. Its
name is a hash of the backbone's weights, the images and the preprocessing, so an entry never becomes stale. The least
recently used entries are deleted when all together exceed `MAX_BYTES`. A SHA-256 of the features is stored with them:
a damaged entry counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmoco.evaluation.budget import budget_bytes, gibibytes
from fastmoco.run.fingerprint import fingerprint
from fastmoco.run.sealed import content_sha256, is_intact, sealed_bytes
from pipelines.data.index import ImageIndex
from pipelines.data.manifest import file_stats
from pipelines.files import replacing

FORMAT = 3  # increment when the same backbone, images and preprocessing give different features
MAX_BYTES = 32 * 2**30
_MAX_SHARE_OF_FREE = 0.5  # of the free disk space, for one entry
_ROWS = 65_536  # read at a time


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all parameters and buffers, on any device."""
    return content_sha256(module.state_dict())


def images_hash(index: ImageIndex) -> str:
    """SHA-256 that changes with any image (files by path, size and modification time) and with how they are decoded."""
    digest = hashlib.sha256(f"{fingerprint(index)} {index.decoding}".encode())
    if index.paths is not None:
        digest.update(file_stats(index.paths).tobytes())
        for path in index.paths:
            digest.update(os.fsencode(path) + b"\0")
    if index.records is not None:
        digest.update(file_stats(index.records.paths).tobytes() + b"\0".join(map(os.fsencode, index.records.paths)))
        digest.update(index.records.offsets.tobytes())
    return digest.hexdigest()


def key(weights: str, images: str, preprocessing: Mapping[str, Any]) -> str:
    """Name of an entry: 32 hexadecimal digits, a hash of all three. `preprocessing` must be JSON serialisable."""
    content = [FORMAT, weights, images, dict(sorted(preprocessing.items()))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class FeatureCache:
    """Feature entries in a folder, which is created by the first `store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """(rows, columns) float32 on the device; None if the entry is missing or damaged."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = file.get_slice("features")
                if (list(stored.get_shape()), stored.get_dtype()) != ([rows, columns], "F32"):
                    return None
                features = torch.empty((rows, columns), device=device)
                for start in range(0, rows, _ROWS):  # in parts: the host never holds the whole entry
                    features[start : start + _ROWS] = stored[start : start + _ROWS]
                if not is_intact({"features": features}, file.metadata()):
                    return None
            os.utime(path)  # time of last use
        except (OSError, SafetensorError):
            return None
        return features

    def store(self, name: str, features: Tensor) -> str | None:
        """Store an entry atomically; returns a warning if the disk does not allow it."""
        path, needed = self._path(name), features.numel() * 4
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free, memory = shutil.disk_usage(self.folder).free, budget_bytes(torch.device("cpu"))
            if 2 * needed > memory:  # a copy on the host, and its serialised bytes
                return (
                    f"the features are not cached: that takes {gibibytes(2 * needed)} of {gibibytes(memory)} of memory"
                )
            if needed > _MAX_SHARE_OF_FREE * free:
                return f"the features are not cached: they take {needed:,} bytes and {self.folder} has {free:,} free"
            with replacing(path, needed, shared=True) as temporary:
                temporary.write_bytes(sealed_bytes({"features": features.cpu().float()}))
            self._prune(path)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return f"the features cannot be cached in {self.folder} ({reason}): they will be extracted again next time"
        return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _prune(self, newest: Path) -> None:
        """Delete the least recently used entries until the rest fits in MAX_BYTES; never the newest."""
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= MAX_BYTES or path == newest:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
