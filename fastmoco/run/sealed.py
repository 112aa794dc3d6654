"""Safetensors files with a SHA-256 of their content in their metadata, compared when they are loaded.

A flipped bit in a tensor, in its name or in the metadata loads without complaint through safetensors alone. Files
without the SHA-256, of other programs and of fastmoco 0.1.0, load as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from fastmoco.errors import CheckpointError

SEAL = "sha256"  # its name in the metadata
_PART = 2**24  # elements hashed at a time: the host never holds a copy of a whole tensor


def content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of the names, dtypes, shapes and values of tensors on any device, and of metadata but for the seal."""
    digest = hashlib.sha256()
    for key, value in sorted((metadata or {}).items()):
        if key != SEAL:
            digest.update(f"{len(key)} {len(value)} {key}{value}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in tensor.detach().contiguous().reshape(-1).split(_PART):
            digest.update(part.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file of tensors on any device, with their SHA-256. Raises SafetensorError."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(host, {**(metadata or {}), SEAL: content_sha256(host, metadata)})


def is_intact(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bool:
    """Whether all tensors of a file are those that were saved; True for a file that does not tell."""
    recorded = (metadata or {}).get(SEAL)
    return recorded is None or content_sha256(tensors, metadata) == recorded


def check_seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, origin: str) -> None:
    """Raises CheckpointError if the tensors or metadata of the file `origin` are not those that were saved."""
    if not is_intact(tensors, metadata):
        raise CheckpointError(
            f"{origin} is damaged: its SHA-256 is not the one recorded when it was written; copy it again, or use a "
            f"checkpoint of its run"
        )
