"""Text printed by a run: settings at the start, evaluations, and the summary at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmoco.config import ResolvedConfig
from fastmoco.console import Fact, say, show_facts, summary_facts
from fastmoco.device import describe
from fastmoco.distributed.world import World
from fastmoco.model.encoder import Encoder
from fastmoco.run.thread_count import tunes_threads
from pipelines.data.dataset import Dataset

_EVALUATION_FORMATS = {
    "knn_top1_percent": "kNN {:.1f} %",
    "knn_bank_images": "with {:,.0f} images in the bank",
    "knn_pixels_top1_percent": "kNN of raw pixels {:.1f} %",
    "alignment": "alignment {:.3f}",
    "uniformity": "uniformity {:.3f}",
    "effective_rank": "effective rank {:.1f}",
}


def evaluation_line(when: str, numbers: dict[str, float]) -> str:
    """Results of an evaluation during training, as one line."""
    return f"{when}: " + ", ".join(_EVALUATION_FORMATS[name].format(value) for name, value in numbers.items())


def start_facts(
    config: ResolvedConfig, dataset: Dataset, query: Encoder, reasons: dict[str, str], world: World, folder: Path
) -> list[Fact]:
    """Settings and the reasons for them, as returned by `resolve`."""
    data, augment, model, optim = config.data, config.augment, config.model, config.optim
    parameters = sum(parameter.numel() for parameter in query.parameters())
    head = " → ".join(str(layer.out_features) for layer in query.head if isinstance(layer, torch.nn.Linear))
    width = f" × {model.width:g}" if model.width != 1 else ""
    symmetric = ", symmetric" if model.symmetric else ""
    momentum = {"queue": f"m {model.moco_m:g}", "memory-bank": f"m {model.bank_m:g}"}
    dictionary = (
        f"{model.moco_k:,} keys, {momentum.get(model.mechanism, 'tied encoders')}, T {model.moco_t:g}{symmetric}"
    )
    sgd = f"SGD, lr {optim.lr:g}, wd {optim.wd:g}, {optim.epochs} epochs"
    facts = [
        Fact("data", dataset.train.describe(), dataset.indexing),
        Fact("evaluated on", dataset.test.describe() if dataset.test else "held-out images, or pairs of views"),
        Fact("pipeline", f"{data.pipeline}, {data.workers} workers", reasons.get("pipeline", "")),
        Fact("views", f"{augment.crop_size} pixels, augmentation {augment.aug}", reasons.get("crop_size", "")),
        Fact("encoder", f"{model.arch}{width}, {parameters / 1e6:.1f} M parameters", reasons.get("arch", "")),
        Fact("stem", str(model.stem), reasons.get("stem", "")),
        Fact("head", f"{query.feature_dim} → {head}"),
        Fact(model.mechanism.replace("-", " "), dictionary, reasons.get("moco_k", "")),
        Fact("batch", _batch(optim.batch_size, model.bn_splits, world.size)),
        Fact("optimiser", sgd, reasons.get("lr", "")),
        Fact("device" if world.size == 1 else "devices", _devices(config, world), reasons.get("device", "")),
        Fact("folder", str(folder)),
    ]
    facts += [Fact("left out", path, reason) for path, reason in dataset.quarantine[:3]]
    if len(dataset.quarantine) > 3:
        facts.append(Fact("left out", f"{len(dataset.quarantine):,} images in total"))
    return facts


def show_selection(console: Console, notes: Sequence[str], table: Sequence[tuple[str, float, bool]]) -> None:
    """Fast paths that were left out, and the candidates that were timed: (name, milliseconds a step, chosen)."""
    for note in notes:
        say(console, note, "yellow")
    if table:
        chosen = {name: "chosen" for name, _, is_chosen in table if is_chosen}
        show_facts(
            console, "time of a step", [Fact(f"{ms:.1f} ms", name, chosen.get(name, "")) for name, ms, _ in table]
        )


def _batch(images: int, splits: int, devices: int) -> str:
    """Batch size, in total and per device, and batch norm groups, as text."""
    if devices == 1:
        return f"{images} images, {splits} batch norm splits"
    groups = f"{splits} batch norm splits, {splits // devices} on each"
    if splits < devices:
        groups = f"{splits} batch norm splits, each over {devices // splits} devices"
    if splits == 1:
        groups = "synchronised batch norm"
    return f"{images} images, {images // devices} on each of {devices} devices; {groups}"


def _devices(config: ResolvedConfig, world: World) -> str:
    device = f"{describe(world.device)}, {config.run.amp}, {_step(config)}"
    if world.size == 1:
        return device.replace("CPU, ", "CPU, up to ") if tunes_threads(config, world) else device
    machines = world.size // world.rank_info.local_size
    where = "" if machines == 1 else f" on {machines} machines"
    return f"{world.size}{where}, each {device}; gradients reduced in {config.scale.grad_comm}"


def _step(config: ResolvedConfig) -> str:
    """Kernels, compilation, CUDA graph and activation checkpointing, as text."""
    run = config.run
    graph = ", one CUDA graph per step" if run.cuda_graph == "on" else ""
    checkpointing = ", activation checkpointing" if run.checkpoint_activations else ""
    return f"{run.kernels} kernels, compile {run.compile}{graph}{checkpointing}"


def end_facts(
    records: Sequence[dict[str, Any]], seconds: float, images_per_s: float | None, files: Sequence[str]
) -> list[Fact]:
    """Summary of a run: accuracy from its metrics; `seconds` and images/s of this process only."""
    knn = [record["knn_top1_percent"] for record in records if "knn_top1_percent" in record]
    pixels = [record["knn_pixels_top1_percent"] for record in records if "knn_pixels_top1_percent" in record]
    return summary_facts(
        minutes=seconds / 60,
        images_per_s=images_per_s or 0.0,
        knn_before_percent=knn[0] if len(knn) > 1 else None,
        knn_after_percent=knn[-1] if knn else None,
        raw_pixels_percent=pixels[0] if pixels else None,
        files=files,
    )
