"""Earlier choices, by what they depend on: device, versions, architecture and shapes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastmoco.config import ResolvedConfig
from fastmoco.device import describe
from fastmoco.run.environment import versions
from fastmoco.tuning.candidates import FIELDS, Auto, Candidate
from pipelines.files import cache_folder, read_json_object, write_atomically

FORMAT = 1
_SHAPES = ("arch", "width", "stem", "head", "mlp", "moco_dim", "moco_k", "bn_splits", "symmetric", "mechanism")
_MORE = ("pipeline", "workers", "aug", "batch_size", "crop_size", "checkpoint_activations", "objective", "optimizer")


def cache_path() -> Path:
    """`tuning.json` in fastmoco's cache."""
    return cache_folder() / "tuning.json"


def key(config: ResolvedConfig, auto: Auto, device: torch.device, ranks: int) -> str:
    """What a choice depends on, as JSON: also which fields are free to choose, and the values of the others."""
    flat = config.flat()
    parts: dict[str, Any] = {name: flat[name] for name in (*_SHAPES, *_MORE)}
    parts |= {name: "auto" if name in auto else flat[name] for name in FIELDS}
    cuda = device.type == "cuda"
    parts |= {"device": describe(device), "capability": torch.cuda.get_device_capability(device) if cuda else None}
    return json.dumps(parts | {"ranks": ranks, "versions": versions()}, sort_keys=True)


def load(path: Path, key: str) -> Candidate | None:
    """The choice stored for a key; None if there is none, or the file is damaged, which is written anew then."""
    found = _read(path).get(key)
    try:
        return Candidate(**found["choice"])  # type: ignore[index]
    except (TypeError, KeyError):
        return None


def store(path: Path, key: str, choice: Candidate, milliseconds: dict[str, float]) -> None:
    """Raises OSError if the file cannot be written."""
    entries = _read(path) | {key: {"choice": asdict(choice), "ms": milliseconds}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n", shared=True)


def _read(path: Path) -> dict[str, Any]:
    content = read_json_object(path)
    if content is None or content.get("format") != FORMAT:
        return {}
    entries = content.get("entries")
    return entries if isinstance(entries, dict) else {}
