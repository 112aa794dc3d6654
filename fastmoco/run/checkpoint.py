"""Checkpoints on disk: written atomically, free of code, and verified by SHA-256 before loading.

A checkpoint is `step-000001234.safetensors` (tensors by name, and one JSON object of primitives) and its SHA-256 in
`step-000001234.safetensors.sha256`, in the format of `sha256sum -c`. safetensors contains no code, and its header is
checked against the size of the file before anything is read.

`save` writes both under temporary names, flushes them to disk and renames them, the tensors last: a process that is
killed at any moment leaves the earlier checkpoints intact. One process writes to a folder; many may read it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmoco.errors import CheckpointError
from pipelines.files import record_digests, recorded_digests, replacing, sha256, sidecar

FORMAT = 1
Spec = tuple[tuple[int, ...], torch.dtype]

_NAME = re.compile(r"step-(\d{9,})\.safetensors")
_LEFTOVER = re.compile(r"step-\d{9,}\.safetensors(\.sha256)?\.tmp")
_HEADER_BYTES = 100_000_000  # safetensors refuses a longer header
_MARGIN_BYTES = 65_536  # for blocks of the folder and the sidecar
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def save(directory: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step, replacing an earlier one of the same step, and return its path.

    Tensors may be on any device, share memory and have any strides; they are stored contiguous. `meta` consists of
    primitives, lists and dicts. Raises CheckpointError if it cannot be written; existing checkpoints stay.
    """
    path = directory / f"step-{step:09d}.safetensors"
    metadata = {"format": str(FORMAT), "meta": json.dumps(meta, allow_nan=False)}
    host = _on_host(tensors)
    with _writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        _check_free_space(directory, host, metadata)
        # While a checkpoint is being replaced, the sidecar has both hashes, so that either file verifies.
        replaced = recorded_digests(path) if path.exists() else []
        with replacing(path) as part:
            save_file(host, part, metadata)
            digest = sha256(part)
            record_digests(path, [digest, *replaced])
        if replaced:
            record_digests(path, [digest])
    return path


def load(path: Path, expected: Mapping[str, Tensor | Spec]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint whose tensors have the names, shapes and dtypes of `expected`: (tensors on the CPU, meta).

    The hash and the header are checked before a tensor is allocated. Raises CheckpointError if it is missing, corrupt,
    of another format, or differs in names, shapes or dtypes, which are listed.
    """
    specs = {name: _spec(value) for name, value in expected.items()}
    _check_present(path)
    with _reading(path):
        # A larger file has other tensors, as the check of its header below finds; hashing it could take hours.
        max_bytes = 8 + _HEADER_BYTES + sum(dtype.itemsize * math.prod(shape) for shape, dtype in specs.values())
        if path.stat().st_size <= max_bytes:
            _check_hash(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = _meta(path, file.metadata())
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            _check_specs(path, {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}, specs)
            tensors = {name: file.get_tensor(name).clone() for name in specs}  # copied out of the mapped file
    return tensors, meta


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hash verifies, and a warning for every newer one that does not.

    (None, []) if there is no checkpoint. Raises CheckpointError if there are some and none verifies.
    """
    warnings: list[str] = []
    for path in _newest_first(directory):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.append(f"{error}; falling back to an older checkpoint")
        else:
            return path, warnings
    if warnings:
        raise CheckpointError(
            f"none of the {len(warnings)} checkpoints in {directory} can be used: restore one from a backup, or start "
            f"again with --overwrite (the newest: {warnings[0].removesuffix('; falling back to an older checkpoint')})"
        )
    return None, []


def verify(path: Path) -> dict[str, Any]:
    """Return `meta`. Raises CheckpointError if the file is missing or its hash or header is wrong."""
    _check_present(path)
    with _reading(path):
        _check_hash(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return _meta(path, file.metadata())


def is_named(path: Path) -> bool:
    """Whether a file has the name of a checkpoint, rather than one that a user gave it."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """The global step in a checkpoint's file name. Raises CheckpointError for other names."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not the name of a checkpoint: expected step-000001234.safetensors")
    return int(match[1])


def prune(directory: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest checkpoints, but never the newest that verifies. Returns the deleted paths."""
    assert keep > 0
    surplus = list(_newest_first(directory))[keep:]
    if surplus:
        with suppress(CheckpointError):  # if none verifies, keep them all: corrupt ones may be recoverable
            valid, _ = newest(directory)
            surplus = [path for path in surplus if path != valid]
            for path in surplus:
                path.unlink(missing_ok=True)  # tensors first: a sidecar alone is a leftover, which `sweep` deletes
                sidecar(path).unlink(missing_ok=True)
            return surplus
    return []


def sweep(directory: Path) -> list[Path]:
    """Delete leftovers of a killed `save` or `prune`: temporary files and sidecars without tensors. Returns them."""
    if not directory.is_dir():
        return []
    leftovers = [
        path
        for path in sorted(directory.iterdir())
        if _LEFTOVER.fullmatch(path.name)
        or (path.suffix == ".sha256" and _NAME.fullmatch(path.stem) and not path.with_suffix("").exists())
    ]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


# ---- writing ---------------------------------------------------------------------------------------------------------


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, as safetensors requires; copies only if necessary."""
    host: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage()
        if storage.nbytes() != copy.nbytes or storage.data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        host[name] = copy
    return host


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of writing into a CheckpointError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path} ({_reason(error)}): free space or choose another disk") from error


def _check_free_space(directory: Path, host: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    names_bytes = sum(200 + 2 * len(name) for name in host) + 2 * sum(map(len, metadata.values()))
    needed = sum(tensor.nbytes for tensor in host.values()) + names_bytes + _MARGIN_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"a checkpoint needs {needed} bytes and the disk of {directory} has {free} bytes free: "
            f"make room, or lower --keep-checkpoints"
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({_reason(error)})") from error


def _check_present(path: Path) -> None:
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(f"there is no checkpoint at {path}: expected a step-….safetensors file")
    if not sidecar(path).is_file():
        raise CheckpointError(
            f"{path} has no {sidecar(path).name} beside it, so it cannot be verified: copy both files"
        )


def _check_hash(path: Path) -> None:
    recorded = recorded_digests(path)
    if not recorded:
        raise CheckpointError(f"{sidecar(path)} has no SHA-256, so {path.name} cannot be verified")
    if sha256(path) not in recorded:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded when it was written")


def _meta(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    file_format = (metadata or {}).get("format")
    if file_format != str(FORMAT):
        raise CheckpointError(
            f"{path} has checkpoint format {file_format!r}, expected {FORMAT!r}: use the fastmoco version that wrote it"
        )
    try:
        meta = json.loads((metadata or {})["meta"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no valid JSON in its metadata ({type(error).__name__})") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} has a JSON {type(meta).__name__} in its metadata, expected an object")
    return meta


def _check_specs(path: Path, actual: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, Spec]) -> None:
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    differences = []
    for name in sorted({*actual, *expected}):
        if name not in actual:
            differences.append(f"{name} is missing")
        elif name not in expected:
            differences.append(f"{name!a} is not in this model")
        else:
            (shape, code), (expected_shape, expected_dtype) = actual[name], expected[name]
            if (shape, code) != (expected_shape, codes[expected_dtype]):
                text = f"{_dtype_name(_DTYPES.get(code, code))} {list(shape)}"
                differences.append(f"{name} is {text}, expected {_dtype_name(expected_dtype)} {list(expected_shape)}")
    if differences:
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(f"{path} belongs to another model: {'; '.join(differences[:8])}{more}")


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


# ---- names -----------------------------------------------------------------------------------------------------------


def _newest_first(directory: Path) -> Iterable[Path]:
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def _spec(value: Tensor | Spec) -> Spec:
    shape, dtype = (value.shape, value.dtype) if isinstance(value, Tensor) else value
    return tuple(shape), dtype


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return (text or type(error).__name__).splitlines()[0]
