"""Files of torch.save that others wrote: what is in them, without executing anything or trusting a size they claim."""

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

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how these files begin, since torch 1.6 and before


class TorchFile(NamedTuple):
    """The tensors of a state dict, and the text that stands beside it, such as `arch`."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]


def read_torch(path: Path) -> TorchFile:
    """A bare state dict, or the `state_dict` of a checkpoint, on the CPU and backed by the file where it is a zip file.

    torch's restricted unpickler makes tensors and plain values only. Of a zip file the checksums are compared and the
    sizes of the tensors are added up before one is made; of an older one nothing is made that the file does not hold.

    Raises CheckpointError: damaged, no such file, or with other Python objects in it.
    """
    origin, size_bytes = printable(str(path)), path.stat().st_size
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
            claimed = _tensors(torch.load(path, map_location="meta", weights_only=True))
            claimed_bytes = sum(tensor.nbytes for tensor in claimed.values())
            if claimed_bytes > size_bytes:
                raise ValueError(f"its tensors would take {claimed_bytes:,} bytes, and the file has {size_bytes:,}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        tensors = _tensors(content)
    except Exception as error:  # foreign bytes: an unpickler may raise anything, and all of it means a bad file
        raise CheckpointError(f"{origin} cannot be used: {_reason(error)}") from error
    return TorchFile(tensors, {name: text for name, text in content.items() if isinstance(text, str)})


def _check_zip(path: Path) -> None:
    """torch.save compresses nothing, so that no file takes more memory than it has bytes."""
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("it is a compressed zip file, and none of torch.save")
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
    if isinstance(error, pickle.UnpicklingError) and (foreign := re.search(r"GLOBAL (\S+)", text)):
        return f"it holds a Python object ({foreign[1]}), which is not loaded because it could run code"
    first = printable(next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__))
    return first if type(error) is ValueError else f"it is damaged, or no file of torch.save ({first[:120]})"
