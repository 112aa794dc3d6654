"""Reading of untrusted torch.save files: executes no code, and does not trust the sizes they declare.

zip file (since torch 1.6)     ARCHIVE/data.pkl, the pickle; ARCHIVE/data/KEY, the values of each tensor
older                          pickles of a magic number, a version, the byte order, the content and the keys, then
                               for each key the number of values in 8 bytes, and the values
a plain pickle                 of NumPy arrays, as detectron2 reads them
"""

from __future__ import annotations

import io
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastmoco.backbones.pickles import Named, Object, Persistent, Pickle, read_pickle
from fastmoco.backbones.stored_tensors import StoredTensor, storage, stored_tensor
from fastmoco.backbones.tensor_files import TensorFile
from fastmoco.errors import CheckpointError
from pipelines.data.decode import printable

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of the formats since torch 1.6 and before

_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DEPTH = 16  # of nested dicts: five in files of VISSL


class _Storages(NamedTuple):
    """Where the values of tensors are: by key, the position in the file and the number of bytes, or a zip member."""

    positions: dict[str, tuple[int, int]]
    members: dict[str, zipfile.ZipInfo]


def read_torch(path: Path) -> TensorFile:
    """The tensors in a file of torch.save, in dicts and lists at any depth, and the strings of its outermost dict.

    Anything else, such as settings, optimisers and models, is passed over as inert data (`backbones.pickles`). For a
    zip file, checksums are verified. No tensor is allocated before `load`, and then no more than the file contains.

    Raises CheckpointError for a file that is damaged or in another format.
    """
    origin = printable(str(path))
    try:
        with path.open("rb") as file:
            pickle, storages = _read_zip(file) if zipfile.is_zipfile(file) else _read_pickles(file)
        tensors, models = _walk(pickle.value)
    except Exception as error:  # on untrusted bytes a reader may raise anything
        raise CheckpointError(f"{origin} cannot be used: {_reason(error)}") from error
    outermost = dict(_entries(pickle.value))
    return TensorFile(
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        load=lambda names: _load(path, storages, {name: tensors[name] for name in names}),
        place=lambda name: tensors[name].place,
        texts={name: text for name, text in outermost.items() if isinstance(text, str)},
        whole_models=tuple(models),
    )


def _reason(error: Exception) -> str:
    text = printable(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))
    return text if type(error) is ValueError else f"it is damaged, or not a torch.save file ({text[:120]})"


# ---- the two formats -------------------------------------------------------------------------------------------------


def _read_zip(file: BinaryIO) -> tuple[Pickle, _Storages]:
    """Reject compressed files, which torch.save does not write and which could expand, and wrong checksums."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is a compressed zip file, which torch.save does not write: unpack it")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"it is damaged: {printable(damaged)} does not have its checksum")
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip file, but not of torch.save: there is no data.pkl in it")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in members:
            raise ValueError(
                "it is a TorchScript archive, which holds code: save the weights of its model with "
                "torch.save(torch.jit.load(FILE).state_dict(), ...)"
            )
        if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        stored = {name.removeprefix(root + "data/"): member for name, member in members.items()}
        return read_pickle(io.BytesIO(archive.read(root + "data.pkl"))), _Storages({}, stored)


def _read_pickles(file: BinaryIO) -> tuple[Pickle, _Storages]:
    """torch.save before version 1.6, or a plain pickle."""
    file.seek(0)
    first = read_pickle(file)
    if first.value != _MAGIC:
        return first, _Storages({}, {})
    read_pickle(file)  # the version of the format, 1001 in every release
    system = read_pickle(file).value
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError("it was written on a big-endian machine")
    content, keys = read_pickle(file), read_pickle(file).value
    itemsizes = {s.key: s.dtype.itemsize for s in map(storage, content.persistent) if s is not None}
    at, positions = file.tell(), {}
    end = file.seek(0, io.SEEK_END)
    for key in map(str, keys):
        file.seek(at)
        nbytes = int.from_bytes(file.read(8), "little", signed=True) * itemsizes[key]
        if nbytes < 0 or at + 8 + nbytes > end:
            raise ValueError(f"it is damaged: it ends within the values of storage {key[:20]!a}")
        positions[key] = (at + 8, nbytes)
        at += 8 + nbytes
    return content, _Storages(positions, {})


# ---- names and values ------------------------------------------------------------------------------------------------


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, by name; nothing for what is none."""
    if isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value) if not isinstance(item, int | float))
    elif isinstance(value, dict | Object):
        items = value if isinstance(value, dict) else _pairs(value) | value.items
        yield from ((name, item) for name, item in items.items() if isinstance(name, str))


def _pairs(made: Object) -> dict[str, Any]:
    """Of an OrderedDict from Python 2, which is called with a list of [name, value]."""
    is_dict = isinstance(made.of, Named) and made.of.path == "collections.OrderedDict"
    pairs = made.args[0] if is_dict and isinstance(made.args, tuple) and len(made.args) == 1 else []
    if not isinstance(pairs, list):
        return {}
    return {
        pair[0]: pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
    }


def _walk(content: Any) -> tuple[dict[str, StoredTensor], list[str]]:
    """All tensors by name, the shortest names first, and the classes of whole models.

    Each container is entered once, so that one which holds itself, or the same one many times, costs no more.
    """
    tensors: dict[str, StoredTensor] = {}
    models: list[str] = []
    waiting, entered = deque([("", 0, content)]), {id(content)}
    while waiting:
        path, depth, container = waiting.popleft()
        models += _module_class(container)
        for name, value in _entries(container):
            full = f"{path}.{name}" if path else name
            if (tensor := stored_tensor(value)) is not None:
                tensors.setdefault(full, tensor)
            elif isinstance(value, dict | list | tuple | Object) and id(value) not in entered and depth < _MAX_DEPTH:
                entered.add(id(value))
                waiting.append((full, depth + 1, value))
    return tensors, models


def _module_class(value: Any) -> list[str]:
    """The class, if unpickling would have made a torch.nn.Module."""
    if not (isinstance(value, Object) and isinstance(value.state, dict)):
        return []
    of = value.of.id[1] if isinstance(value.of, Persistent) and isinstance(value.of.id, tuple) else value.of
    return [of.path] if isinstance(of, Named) and {"_modules", "_parameters"} <= value.state.keys() else []


def _load(path: Path, storages: _Storages, tensors: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """Copies of these tensors. Raises ValueError where the file does not have what they are said to be made of."""
    size_bytes, declared_bytes = path.stat().st_size, sum(tensor.nbytes for tensor in tensors.values())
    if declared_bytes > size_bytes:
        raise ValueError(f"its tensors would take {declared_bytes:,} bytes, and the file has {size_bytes:,}")
    loaded: dict[str, Tensor] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) if storages.members else nullcontext() as archive:
        latest, values = None, b""  # many tensors may share one storage
        for name, tensor in tensors.items():
            if latest != tensor.values:
                latest, values = tensor.values, _values(file, archive, storages, tensor.values)
            if tensor.end > len(values):
                raise ValueError(f"it is damaged: {printable(name[:80])} needs {tensor.end:,} bytes of {len(values):,}")
            own = bytearray(values[tensor.offset * tensor.dtype.itemsize : tensor.end])
            flat = torch.frombuffer(own or bytearray(16), dtype=tensor.dtype)  # 16: none of its elements will be read
            loaded[name] = flat.as_strided(tensor.shape, tensor.stride).clone()
    return loaded


def _values(file: BinaryIO, archive: zipfile.ZipFile | None, storages: _Storages, values: str | bytes) -> bytes:
    """The bytes of a storage. Raises KeyError if it is missing."""
    if isinstance(values, bytes):
        return values
    if archive is not None:
        return archive.read(storages.members[values])
    position, nbytes = storages.positions[values]
    file.seek(position)
    return file.read(nbytes)
