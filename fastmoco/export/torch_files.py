"""Safe reading of untrusted torch.save files: executes no code, and does not trust the sizes they declare."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco.errors import CheckpointError
from pipelines.data.decode import printable

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of the formats since torch 1.6 and before


class TorchFile(NamedTuple):
    """The tensors of a state dict, and the strings stored beside it, such as `arch`."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]


def read_torch(path: Path) -> TorchFile:
    """Read a bare state dict or the `state_dict` of a checkpoint, on the CPU; tensors of a zip file are memory-mapped.

    torch's restricted unpickler creates only tensors and plain values. For a zip file, checksums and the total size of
    the tensors are verified before any is allocated; for the older format, no more is allocated than the file contains.

    Raises CheckpointError for a file that is damaged, in another format, or contains other Python objects.
    """
    origin, size_bytes = printable(str(path)), path.stat().st_size
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
            declared = _tensors(torch.load(path, map_location="meta", weights_only=True))
            declared_bytes = sum(tensor.nbytes for tensor in declared.values())
            if declared_bytes > size_bytes:
                raise ValueError(f"its tensors would take {declared_bytes:,} bytes, and the file has {size_bytes:,}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        tensors = _tensors(content)
    except Exception as error:  # on untrusted bytes an unpickler may raise anything
        raise CheckpointError(f"{origin} cannot be used: {_reason(error)}") from error
    return TorchFile(tensors, {name: text for name, text in content.items() if isinstance(text, str)})


def _check_zip(path: Path) -> None:
    """Reject compressed files, which torch.save does not write and which could expand, and wrong checksums."""
    with zipfile.ZipFile(path) as file:
        if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
            raise ValueError("it is a compressed zip file, which torch.save does not write")
        damaged = file.testzip()
    if damaged is not None:
        raise ValueError(f"it is damaged: {damaged} does not have its checksum")


def _tensors(content: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a state dict, or a dict with a state_dict")
    return {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", text)):
        return f"it holds a Python object ({found[1]}), which is not loaded because it could run code"
    first = printable(next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__))
    return first if type(error) is ValueError else f"it is damaged, or not a torch.save file ({first[:120]})"
