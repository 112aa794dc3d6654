"""Checkpoints on disk: whole or absent, never executed, refused when a single bit differs.

A checkpoint is `step-000001234.safetensors` (tensors by name, and one JSON object of primitives) beside its SHA-256 in
`step-000001234.safetensors.sha256`, which `sha256sum -c` understands. safetensors holds no code, and its header is
checked against the size of the file before anything is read.

`save` writes both under temporary names, flushes them to the disk and renames them, the tensors last: a process that is
killed at any moment leaves the earlier checkpoints as they were. One process writes to a folder; many may read it.
"""

from __future__ import annotations

import json
import math
import os
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
from fastmoco.files import record_digests, recorded_digests, sha256, sidecar, sync, temporary

FORMAT = 1
Spec = tuple[tuple[int, ...], torch.dtype]

_NAME = re.compile(r"step-(\d{9,})\.safetensors")
_LEFTOVER = re.compile(r"step-\d{9,}\.safetensors(\.sha256)?\.tmp")
_HEADER_BYTES = 100_000_000  # safetensors refuses a longer header
_MARGIN_BYTES = 65_536  # the folder's own blocks and the sidecar
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

    Tensors may lie on any device, overlap and have any strides; they are stored contiguous. `meta` holds primitives,
    lists and dicts of them. Raises CheckpointError when the disk is full or refuses; what was there before stays.
    """
    path = directory / f"step-{step:09d}.safetensors"
    part = temporary(path)
    metadata = {"format": str(FORMAT), "meta": json.dumps(meta, allow_nan=False)}
    host = _on_host(tensors)
    with _writing(path, part):
        directory.mkdir(parents=True, exist_ok=True)
        _check_free_space(directory, host, metadata)
        part.unlink(missing_ok=True)
        save_file(host, part, metadata)
        digest = sha256(part)
        sync(part)
        # While a checkpoint is being replaced both hashes hold, so that either file is whole at every moment.
        replaced = recorded_digests(path) if path.exists() else []
        record_digests(path, [digest, *replaced])
        os.replace(part, path)
        sync(directory)
        if replaced:
            record_digests(path, [digest])
    return path


def load(path: Path, expected: Mapping[str, Tensor | Spec]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint whose tensors have the names, shapes and dtypes of `expected`: (tensors on the CPU, meta).

    The hash and the header are checked before a tensor is made. Raises CheckpointError: absent, damaged, of another
    format, or with a difference in a name, shape or dtype, each of which is listed.
    """
    specs = {name: _spec(value) for name, value in expected.items()}
    _check_present(path)
    with _reading(path):
        # A larger file cannot hold these tensors: its header says so below, and hashing it could take hours.
        most_bytes = 8 + _HEADER_BYTES + sum(dtype.itemsize * math.prod(shape) for shape, dtype in specs.values())
        if path.stat().st_size <= most_bytes:
            _check_hash(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = _meta(path, file.metadata())
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            _check_specs(path, {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in found.items()}, specs)
            tensors = {name: file.get_tensor(name).clone() for name in specs}  # own memory, not the mapped file
    return tensors, meta


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hash verifies, and a warning line for every newer one that does not.

    (None, []) where there is no checkpoint at all. Raises CheckpointError where there are some and none verifies.
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
            f"none of the {len(warnings)} checkpoints in {directory} can be used: restore one from a copy, or start "
            f"again with --overwrite (the newest: {warnings[0].removesuffix('; falling back to an older checkpoint')})"
        )
    return None, []


def verify(path: Path) -> dict[str, Any]:
    """Return `meta`, or raise CheckpointError: absent, not of its recorded hash, or a header that does not fit."""
    _check_present(path)
    with _reading(path):
        _check_hash(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return _meta(path, file.metadata())


def step_of(path: Path) -> int:
    """The global step in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint: expected step-000001234.safetensors")
    return int(match[1])


def prune(directory: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest checkpoints, never the newest that verifies; returns what was deleted."""
    assert keep > 0
    paths = list(_newest_first(directory))
    doomed = paths[keep:]
    if doomed:
        with suppress(CheckpointError):  # without a single good one, a damaged one may still be worth a rescue
            good, _ = newest(directory)
            doomed = [path for path in doomed if path != good]
            for path in doomed:
                path.unlink(missing_ok=True)  # the tensors first: a sidecar alone is a leftover, not a checkpoint
                sidecar(path).unlink(missing_ok=True)
            return doomed
    return []


def sweep(directory: Path) -> list[Path]:
    """Delete what a killed `save` or `prune` left: temporary files and sidecars without tensors; returns them."""
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
    """Contiguous CPU tensors that share no storage, as safetensors demands; copies only where it has to."""
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
def _writing(path: Path, part: Path) -> Iterator[None]:
    """Delete the partial file whatever happens, and say in one line why a checkpoint could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path} ({_reason(error)}): free space or choose another disk") from error
    finally:
        with suppress(OSError):
            part.unlink()


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
    if not path.is_file():  # also spares us from waiting on a pipe
        raise CheckpointError(f"there is no checkpoint at {path}: expected a step-….safetensors file")
    if not sidecar(path).is_file():
        raise CheckpointError(
            f"{path} has no {sidecar(path).name} beside it, so it cannot be verified: copy both files"
        )


def _check_hash(path: Path) -> None:
    recorded = recorded_digests(path)
    if not recorded:
        raise CheckpointError(f"{sidecar(path)} holds no SHA-256, so {path.name} cannot be verified")
    if sha256(path) not in recorded:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded when it was written")


def _meta(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    found = (metadata or {}).get("format")
    if found != str(FORMAT):
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}, expected {FORMAT!r}: use the fastmoco that wrote it"
        )
    try:
        meta = json.loads((metadata or {})["meta"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no readable JSON of its own ({type(error).__name__})") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} holds a JSON {type(meta).__name__}, expected an object")
    return meta


def _check_specs(path: Path, found: Mapping[str, tuple[tuple[int, ...], str]], specs: Mapping[str, Spec]) -> None:
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    lines = []
    for name in sorted({*found, *specs}):
        if name not in found:
            lines.append(f"{name} is missing")
        elif name not in specs:
            lines.append(f"{name!a} is not in this model")
        else:
            (shape, code), (wanted_shape, wanted_dtype) = found[name], specs[name]
            if (shape, code) != (wanted_shape, codes[wanted_dtype]):
                dtype = str(_DTYPES.get(code, code)).removeprefix("torch.")
                wanted = str(wanted_dtype).removeprefix("torch.")
                lines.append(f"{name} is {dtype} {list(shape)}, expected {wanted} {list(wanted_shape)}")
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise CheckpointError(f"{path} belongs to another model: {'; '.join(lines[:8])}{more}")


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
