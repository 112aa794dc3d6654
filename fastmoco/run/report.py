"""Text printed by a run: settings at the start, evaluations, and the summary at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmoco.config import ResolvedConfig
from fastmoco.config.augment import describe as describe_augmentation
from fastmoco.console import Fact, counted, say, show_facts, summary_facts
from fastmoco.device import describe
from fastmoco.distributed.world import World
from fastmoco.model.batchnorm.convert import normalisation
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.encoder import Encoder
from fastmoco.registry import ARCHITECTURES
from fastmoco.run.data_facts import data_facts
from fastmoco.run.thread_count import tunes_threads
from fastmoco.run.verdict import last_verdict
from pipelines.augment import c_ops
from pipelines.data.dataset import Dataset
from pipelines.registry import BACKENDS

_EVALUATION_FORMATS = {
    "knn_top1_percent": "kNN {:.1f} %",
    "knn_output_top1_percent": "kNN of the output {:.1f} %",
    "knn_bank_images": "with {:,.0f} images in the bank",
    "knn_pixels_top1_percent": "kNN of raw pixels {:.1f} %",
    "alignment": "alignment {:.3f} (lower is better)",
    "uniformity": "uniformity {:.3f} (lower is better)",
    "effective_rank": "effective rank {:.1f} of {dim:,}",
}


def evaluation_line(when: str, numbers: dict[str, float], dim: int) -> str:
    """Results of an evaluation during training, as one line; dim is the length of an embedding."""
    parts = (_EVALUATION_FORMATS[name].format(value, dim=dim) for name, value in numbers.items())
    return f"{when}: {', '.join(parts)}"


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
    sgd = f"SGD, lr {optim.lr:g}, wd {optim.wd:g}, {counted(optim.epochs, 'epoch')}"
    facts = [
        *data_facts(dataset),
        Fact("pipeline", f"{data.pipeline}, {counted(data.workers, 'worker')}", reasons.get("pipeline", "")),
        Fact(
            "views",
            f"{augment.crop_size} pixels, {describe_augmentation(augment, data.channels)}",
            reasons.get("crop_size", ""),
        ),
        *_colour(config, world),
        Fact("encoder", f"{model.arch}{width}, {parameters / 1e6:.1f} M parameters", reasons.get("arch", "")),
        *([Fact("stem", str(model.stem), reasons.get("stem", ""))] if model.arch in ARCHITECTURES else []),
        *([Fact("init", reasons.get("init", f"{model.init} is not read again"))] if model.init else []),
        Fact("head", f"{query.feature_dim} → {head}"),
        Fact(model.mechanism.replace("-", " "), dictionary, reasons.get("moco_k", "")),
        Fact(
            "batch",
            _batch(optim.batch_size, model.bn_splits, world.size),
            "; ".join(filter(None, (reasons.get("batch_size"), _norm(query)))),
        ),
        Fact("optimiser", sgd, "; ".join(f"{n}: {reasons[n]}" for n in ("lr", "epochs") if n in reasons)),
        Fact("device" if world.size == 1 else "devices", _devices(config, world), reasons.get("device", "")),
        Fact("folder", str(folder)),
    ]
    facts += [Fact("left out", path, reason) for path, reason in dataset.quarantine[:3]]
    if len(dataset.quarantine) > 3:
        facts.append(Fact("left out", f"{len(dataset.quarantine):,} images in total"))
    return facts


def _colour(config: ResolvedConfig, world: World) -> list[Fact]:
    """Why the colours of the views take longer on this CPU than they could."""
    if world.device.type != "cpu" or BACKENDS[config.data.pipeline].pipeline is not None:
        return []
    reason = c_ops.loop().reason
    return [Fact("colour", "in torch, which takes 5 times as long as compiled", reason)] if reason else []


def show_selection(console: Console, notes: Sequence[str], table: Sequence[tuple[str, float, bool]]) -> None:
    """Fast paths that were left out, and the candidates that were timed: (name, milliseconds a step, chosen)."""
    for note in notes:
        say(console, note, "yellow")
    if table:
        chosen = {name: "chosen" for name, _, is_chosen in table if is_chosen}
        show_facts(
            console, "time of a step", [Fact(f"{ms:.1f} ms", name, chosen.get(name, "")) for name, ms, _ in table]
        )


def _norm(query: Encoder) -> str:
    """What the batch norm splits do not apply to."""
    if any(isinstance(layer, SplitBatchNorm2d) for layer in query.modules()):
        return ""
    other = normalisation(query)
    return f"without batch norm to split{f', with {other}' if other else ''}"


def _batch(images: int, splits: int, devices: int) -> str:
    """Batch size, in total and per device, and batch norm groups, as text."""
    if devices == 1:
        return f"{images} images, {counted(splits, 'batch norm split')}"
    groups = f"{counted(splits, 'batch norm split')}, {splits // devices} on each"
    if splits < devices:
        groups = f"{counted(splits, 'batch norm split')}, each over {devices // splits} devices"
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
    """Summary of a run: verdict and accuracy from its metrics; `seconds` and images/s of this process only."""
    verdict = last_verdict(records)
    facts = [] if verdict is None else [Fact("is it learning?", verdict.verdict, verdict.remedy)]
    knn = [record["knn_top1_percent"] for record in records if "knn_top1_percent" in record]
    pixels = [record["knn_pixels_top1_percent"] for record in records if "knn_pixels_top1_percent" in record]
    if not knn:
        facts += _spread_facts(records)
    return facts + summary_facts(
        minutes=seconds / 60,
        images_per_s=images_per_s or 0.0,
        knn_before_percent=knn[0] if len(knn) > 1 else None,
        knn_after_percent=knn[-1] if knn else None,
        raw_pixels_percent=pixels[0] if pixels else None,
        files=files,
    )


def _spread_facts(records: Sequence[dict[str, Any]]) -> list[Fact]:
    """Measures without labels at the first and the last evaluation."""
    facts = []
    for name, text, better in (
        ("alignment", "{:.3f}", "lower is better: how far apart two views of an image are, 0 to 4"),
        ("uniformity", "{:.3f}", "lower is better: 0 if all images are embedded alike, -4 if evenly"),
        ("effective_rank", "{:.1f}", "directions in which the embeddings vary"),
    ):
        values = [text.format(record[name]) for record in records if record.get(name) is not None]
        if values:
            change = values[-1] if len(values) == 1 else f"{values[0]} → {values[-1]}"
            facts.append(Fact(name.replace("_", " "), change, better))
    return facts
