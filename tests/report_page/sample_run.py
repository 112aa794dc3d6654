"""Folders as runs leave them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.config import RunConfig
from fastmoco.console import Fact
from fastmoco.run.start_record import StartRecord

MACHINE = {"processor": "Test CPU", "cores": 2, "all_cores": 4, "memory_bytes": 8 * 2**30, "system": "Linux-6"}
LABEL_FREE = {
    "alignment": 0.29,
    "uniformity": -1.2,
    "effective_rank": 38.3,
    "separation": 0.39,
    "verdict": "not collapsed",
}


def picture(path: Path, width: int = 320, height: int = 160) -> None:
    """Noise, which no format compresses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def records(epochs: int = 4, labelled: bool = True) -> list[dict[str, Any]]:
    """metrics.jsonl of ten steps an epoch, logged every five, evaluated before training and after each epoch."""
    found = []
    for epoch in range(epochs + 1):
        evaluated = (
            {"knn_top1_percent": 40.0 + 5 * epoch} if labelled else {"alignment": 0.1, "uniformity": -1.0 - epoch}
        )
        evaluated |= {"knn_pixels_top1_percent": 48.4} if labelled and not epoch else {}
        evaluated |= {} if labelled else {"effective_rank": 20.0 + epoch}
        found.append({"step": 10 * epoch, "epoch": epoch, **evaluated})
        for step in (5, 10) if epoch < epochs else ():
            values = {"loss": 6.0 - 0.5 * epoch, "lr": 0.03, "images_per_s": 100.0 + epoch, "data_wait_percent": 5.0}
            found.append({"step": 10 * epoch + step, "epoch": epoch + step // 10, **values})
    return found


def write_run(
    folder: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    state: str = "done",
    message: str = "",
    started: bool = True,
    evaluated: bool = True,
    settings: dict[str, Any] | None = None,
    facts: tuple[Fact, ...] = (Fact("queue", "512 keys", "as in the recipe shapes"), Fact("folder", "elsewhere")),
    status: dict[str, Any] | None = None,
) -> Path:
    """Write a run of four epochs; returns its folder."""
    folder.mkdir(parents=True)
    given = {"data": ("shapes",), "arch": "resnet18", "moco_k": 512, "epochs": 4, "batch_size": 16, "lr": 0.03}
    (folder / "config.json").write_text(RunConfig().replace(**(given | (settings or {}))).to_json())
    content = {"state": state, "exit_code": {"done": 0, "failed": 5}.get(state), "message": message, "step": 40}
    content |= {
        "epoch": 4,
        "updated": "2026-01-02T03:04:05+00:00",
        "git_commit": "0123456",
        "versions": {"torch": "2.11"},
    }
    content |= {"steps": 40, "steps_per_epoch": 10, "chance_loss": 6.24} if started else {}
    (folder / "status.json").write_text(json.dumps(content | (status or {})))
    lines = records() if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if started:
        StartRecord(facts, MACHINE).write(folder)
    picture(folder / "views.png")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000000040.safetensors").write_bytes(b"")
    if evaluated:
        write_evaluation(folder)
    return folder


def write_evaluation(folder: Path, class_names: tuple[str, ...] = ("disc", "ring")) -> None:
    for name in ("retrieval", "feature_map", "confusion-knn", "confusion-linear"):
        picture(folder / "eval" / f"{name}.png")
    probes = [
        {"probe": "knn", "settings": {"k": 200}, "seconds": 1, "top1_percent": 64.8, "top5_percent": 99.0},
        {"probe": "linear", "settings": {"lr": 30.0}, "seconds": 1, "top1_percent": 88.1, "top5_percent": None},
        {
            "probe": "few-label",
            "settings": {},
            "seconds": 1,
            "amount": "1%",
            "top1_percent": 50.0,
            "spread_percent": 1.5,
        },
    ]
    data = {"images": "1,000 images of shapes/test", "classes": list(class_names)}
    content = {"backbone": {}, "data": data, "probes": probes, "label_free": LABEL_FREE}
    (folder / "eval" / "eval.json").write_text(json.dumps(content))
