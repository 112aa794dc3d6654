"""What `tools/fuzz.py` reads: small valid files of every kind, their readers, and the errors that readers may raise."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from fastmoco.backbones.read import read_backbone
from fastmoco.config import RunConfig
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.model.architectures import family
from fastmoco.run import checkpoint
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.metrics import read_metrics
from fastmoco.run.sealed import sealed_bytes
from pipelines.data import manifest as scan_manifest
from pipelines.data.beton import read_index
from pipelines.data.beton_format import (
    ALLOCATION,
    HEADER,
    JPG,
    RAW,
    SAMPLE,
    VERSION,
    field_table,
    read_tables,
)
from pipelines.data.beton_manifest import BetonManifest, manifest_path, sealed_manifest
from pipelines.data.decode import decode
from pipelines.data.decoding import DEFAULT
from pipelines.data.headers import read_header
from pipelines.data.lists import read_list
from pipelines.data.record_digests import RecordDigests, digest
from pipelines.data.scan import scan
from pipelines.data.tar_classes import labels_of
from pipelines.data.tar_shards import inspect_members, list_members
from pipelines.errors import DataError
from pipelines.files import record_digests, sha256


class Target(NamedTuple):
    """samples: (empty folder) → valid files; read: reads the file at a path; errors: what it may raise."""

    samples: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    name: str = "input"


def _pixels(side: int = 16) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)


def _encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_pixels()).save(buffer, kind, **options)
    return buffer.getvalue()


def _images(folder: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
    return [*map(_encoded, kinds), _encoded("JPEG", progressive=True), _encoded("JPEG", exif=exif)]


def _read_image(path: Path) -> None:
    read_header(str(path))
    decode(path.read_bytes(), str(path))


def _tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.int64)}


def _checkpoints(folder: Path) -> list[bytes]:
    return [checkpoint.save(folder, 1, _tensors(), {"step": 1, "config": {"arch": "resnet18"}}).read_bytes()]


def _read_checkpoint(path: Path) -> None:
    record_digests(path, [sha256(path)])  # as if it had been written so
    checkpoint.load(path, _tensors())


def _backbones(folder: Path) -> list[bytes]:
    state = family("resnet18").build("resnet18", width=0.125, stem="cifar").state_dict()
    files = [sealed_bytes(state), safetensors.torch.save(state, {"fastmoco": '{"side": 32}'})]
    settings = argparse.Namespace(lr=0.1, seen=np.arange(3), names={"a"}, model=torch.nn.Linear(2, 2))
    other = {"student": {f"module.{name}": tensor for name, tensor in state.items()}, "args": settings}
    other["teacher"] = {f"backbone.{name}": torch.nn.Parameter(t.float()) for name, t in state.items()}
    for zipped, content in itertools.product((True, False), ({"arch": "resnet18", "state_dict": state}, other)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    arrays = {f"backbone.{name}": tensor.numpy() for name, tensor in state.items()}
    return [*files, *(pickle.dumps({"model": arrays}, protocol) for protocol in (2, 4))]


def _beton() -> bytes:
    """A whole `.beton` file of a JPEG and of pixels, with small pages."""
    images, page = [_encoded("JPEG"), _pixels().tobytes()], 4096
    samples, allocations = np.zeros(2, SAMPLE), np.zeros(2, ALLOCATION)
    for i, data in enumerate(images):
        at = (i + 1) * page
        samples[i], allocations[i] = ((JPG, RAW)[i], 20, 16, at, i), (i, at, len(data))
    header = np.array([(VERSION, 2, page, 2, 3 * page)], HEADER)
    front = header.tobytes() + field_table().tobytes() + samples.tobytes()
    return b"".join(part.ljust(page, b"\0") for part in (front, *images)) + allocations.tobytes()


def _matching_manifest(data: bytes) -> BetonManifest:
    """The manifest that a hostile writer makes for any file whose tables are possible. Raises DataError."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        tables = read_tables(file, "the file")
    starts, count = tables.samples["pointer"].tolist(), len(tables.samples)
    parts = [data[start : start + length] for start, length in zip(starts, tables.lengths.tolist(), strict=True)]
    return BetonManifest(
        dataset="x", bytes=len(data), images=count, tables_sha256=tables.sha256,
        image_digests=RecordDigests.text(map(digest, parts)), class_names=["a", "b"],
        names=[f"{i}.jpg" for i in range(count)], stored={"copied": 1}, settings={"proportion": 0.5, "quality": None},
        quarantine=[], versions={"torch": "2"},
    )  # fmt: skip


def _read_beton(path: Path) -> None:
    Path(manifest_path(str(path))).write_text(_matching_manifest(path.read_bytes()).to_json())
    index = read_index(str(path))
    for i in range(len(index)):
        index.read(i)


def _read_beton_manifest(path: Path) -> None:
    """Beside the whole file; where it is JSON, also with the digest of itself that a hostile writer computes."""
    beton, text = path.with_name(path.name.removesuffix(".json")), path.read_bytes()
    beton.write_bytes(_beton())
    with suppress(DataError):
        read_index(str(beton))
    with suppress(ValueError, RecursionError):
        values = json.loads(text)
        if isinstance(values, dict):
            path.write_text(json.dumps(sealed_manifest(values)))
    read_index(str(beton))


def _tars(folder: Path) -> list[bytes]:
    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for name, data in (
                ("x/ä.jpg", _encoded("JPEG")),
                ("x/ä.cls", b"0"),
                ("y/" + "b" * 98, b""),
                ("c.txt", b"c"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


def _read_tar(path: Path) -> None:
    members = list_members([str(path)])
    labels_of([str(path)], members.files)
    inspect_members(members.records, DEFAULT)


def _scans(folder: Path) -> list[bytes]:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(_encoded("PNG") if i else b"bad")
    path = folder / "scan.npz"
    scan_manifest.write(scan([str(folder / f"{i}.png") for i in range(3)], [], 0), path, str(folder))
    return [path.read_bytes()]


def targets() -> dict[str, Target]:
    """By name."""
    manifest = _matching_manifest(_beton()).to_json().encode()
    status = {"state": "done", "exit_code": 0, "step": 3, "epoch": 1, "message": "", "versions": {"torch": "2"}}
    metrics = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n'
    lists = [b"a.jpg\tx\nb.png\ty\n", "ä.jpg\nb/c.tif\r\n".encode()]
    return {
        "backbone": Target(_backbones, read_backbone, (CheckpointError, ConfigError)),
        "beton": Target(lambda _: [_beton()], _read_beton, (DataError,), "input.beton"),
        "beton-manifest": Target(lambda _: [manifest], _read_beton_manifest, (DataError,), "input.beton.json"),
        "checkpoint": Target(_checkpoints, _read_checkpoint, (CheckpointError,), "step-000000001.safetensors"),
        "config": Target(
            lambda _: [RunConfig().to_json().encode()], lambda path: read_config(path.parent), (ConfigError,),
            "config.json",
        ),
        "image": Target(_images, _read_image, (DataError,)),
        "list": Target(lambda _: lists, lambda path: read_list(str(path)), (DataError,), "input.txt"),
        "metrics": Target(lambda _: [metrics], read_metrics, (CheckpointError,), "metrics.jsonl"),
        "scan": Target(_scans, lambda path: scan_manifest.read(path, str(path.parent)), (DataError,)),
        "status": Target(
            lambda _: [json.dumps(status).encode()], lambda path: read_status(path.parent), (ConfigError,),
            "status.json",
        ),
        "tar": Target(_tars, _read_tar, (DataError,), "input.tar"),
    }  # fmt: skip
