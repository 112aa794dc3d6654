"""`fastmoco eval`: accuracy of a backbone by several probes, collapse diagnosis and plots."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fastmoco.console import Fact, duration, make_console, say, show_facts, shown_path
from fastmoco.device import describe, pick_device
from fastmoco.errors import ConfigError
from fastmoco.evaluation import embedding_plot, retrieval
from fastmoco.evaluation.budget import budget_bytes
from fastmoco.evaluation.confusion import Accuracy, write_csv
from fastmoco.evaluation.confusion_plot import draw_confusion
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.report import show_classes, show_label_free, show_results, write_json
from fastmoco.evaluation.splits import EvaluationSplit, fit_to_budget, split_dataset
from fastmoco.evaluation.suite import Evaluation, Result
from fastmoco.export.read import LoadedBackbone, read_backbone
from fastmoco.run.environment import versions
from fastmoco.run.fingerprint import fingerprint
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import load_dataset
from pipelines.randomness import Domain, permutation

NEIGHBOURS, ROWS = 8, 10  # of the retrieval picture
_TITLES = {"knn": "kNN", "tsne": "t-SNE", "umap": "UMAP"}


def eval_command(options: EvalOptions) -> None:
    """Evaluate, print the results and write them to files.

    Raises ConfigError, DataError, CheckpointError, BackendMissingError and DeviceError.
    """
    with threads_restored(options.cpu_threads), ended_by_stuck_reads():
        _evaluate(options)


def _evaluate(options: EvalOptions) -> None:
    began, console = time.monotonic(), make_console()
    device = pick_device(options.device)
    backbone = read_backbone(options.run, arch=options.arch, stem=options.stem, side=options.crop_size)
    data = options.data or backbone.data
    if data is None:
        raise ConfigError(f"{backbone.origin} does not record its training data: name the images with --data")
    dataset = load_dataset(data, data_root=options.data_root, limit=options.limit, bad_images=options.bad_images)
    split = fit_to_budget(split_dataset(dataset), backbone.feature_dim, budget_bytes(device))
    extractor = Extractor(backbone, options, device, console)
    evaluation = Evaluation(split, extractor, options)
    folder = _folder(options)
    show_facts(console, "fastmoco eval", _facts(backbone, split, evaluation, folder, device))
    results = list(evaluation.run())
    label_free = evaluation.label_free()
    show_results(console, results)
    show_classes(console, results, split.class_names)
    show_label_free(console, label_free)
    try:
        files = _write_matrices(results, split, folder)
        files += _draw(split, extractor, options, folder, console) if options.pictures else []
        write_json(
            folder / "eval.json",
            backbone=_backbone_record(backbone) | {"weights_sha256": extractor.weights_hash},
            data={"data": data, "images": split.description, "classes": list(split.class_names)}
            | {"bank": fingerprint(split.bank.index), "queries": fingerprint(split.queries.index)},
            results=results,
            label_free=label_free,
            files=files,
            versions=versions(),
            seconds=time.monotonic() - began,
        )
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror or error}): choose another with --out") from error
    written = [Fact("written", "eval.json", "all metrics"), *(Fact("", name) for name in files)]
    facts = [Fact("time", duration(time.monotonic() - began)), Fact("folder", shown_path(folder)), *written]
    show_facts(console, "done", facts)


def _folder(options: EvalOptions) -> Path:
    """The output folder, created before the evaluation, so that errors show at once. Raises ConfigError."""
    folder = Path(os.path.abspath(os.path.expanduser(options.out))) if options.out else _default_folder(options.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create {folder} ({error.strerror or error}): choose another with --out") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write to {folder} (permission denied): choose another with --out")
    return folder


def _default_folder(run: str) -> Path:
    """`eval` in the run folder that `run` is or is a file of; otherwise `runs/eval-NAME`."""
    path = Path(os.path.abspath(os.path.expanduser(run)))
    candidates = [path, path.parent, *([path.parent.parent] if path.parent.name == "checkpoints" else [])]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder / "eval"
    return Path("runs").absolute() / f"eval-{path.name.split('.')[0] or 'file'}"


def _backbone_record(backbone: LoadedBackbone) -> dict:
    names = ("arch", "stem", "width", "feature_dim", "side", "mean", "std", "origin", "data")
    return {name: getattr(backbone, name) for name in names}


def _facts(
    backbone: LoadedBackbone, split: EvaluationSplit, evaluation: Evaluation, folder: Path, device: torch.device
) -> list[Fact]:
    width = f" × {backbone.width:g}" if backbone.width != 1 else ""
    hint = "" if evaluation.options.probes or evaluation.options.labels else "see --probes"
    return [
        Fact("backbone", f"{backbone.arch}{width}, {backbone.stem} stem, {backbone.feature_dim:,} features"),
        Fact("from", backbone.origin),
        Fact("images", split.description, split.unlabelled),
        Fact("views", f"{backbone.side} pixels, centre crop"),
        Fact("probes", ", ".join(evaluation.probes) or "none, without labels", hint),
        Fact("device", f"{describe(device)}, {evaluation.options.amp}"),
        Fact("folder", str(folder)),
    ]


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_matrices(results: list[Result], split: EvaluationSplit, folder: Path) -> list[str]:
    """Write all confusion matrices as CSV and PNG; returns the file names."""
    files = []
    for result in results:
        if isinstance(result.accuracy, Accuracy):
            name = f"confusion-{result.probe}"
            title = f"{_TITLES.get(result.probe, result.probe)}, top-1 {result.accuracy.top1_percent:.1f} %"
            write_csv(result.accuracy, split.class_names, folder / f"{name}.csv")
            draw_confusion(result.accuracy, split.class_names, title, folder / f"{name}.png")
            files += [f"{name}.csv", f"{name}.png"]
    return files


def _draw(
    split: EvaluationSplit, extractor: Extractor, options: EvalOptions, folder: Path, console: Console
) -> list[str]:
    """Draw nearest neighbours and, with enough images, the embedding plot; returns the file names."""
    _draw_neighbours(split, extractor, folder / "retrieval.png")
    queries, min_points = split.queries, embedding_plot.MIN_POINTS
    rows = np.sort(permutation(0, Domain.SUBSET, len(queries))[: embedding_plot.MAX_POINTS])
    if len(rows) < min_points:
        say(console, f"no embedding plot of {len(rows)} images: it needs {min_points} or more", "yellow")
        return ["retrieval.png"]
    features = extractor.features(queries)[torch.from_numpy(rows).to(extractor.device)]
    points = embedding_plot.project(features, options.map, options.seed)
    labels = None if split.unlabelled else queries.labels()[rows]
    title = f"{_TITLES[options.map]} of {len(rows):,} images of {queries.index.name}"
    embedding_plot.draw(points, labels, split.class_names, title, folder / "feature_map.png")
    return ["retrieval.png", "feature_map.png"]


def _draw_neighbours(split: EvaluationSplit, extractor: Extractor, path: Path) -> None:
    bank, queries = split.bank, split.queries
    labels = None if split.unlabelled else queries.labels()
    drawn = retrieval.choose_queries(labels, len(queries), ROWS)
    rows = torch.from_numpy(drawn).to(extractor.device)
    exclude = rows if split.unlabelled else None  # without labels, the bank contains the queries
    features = extractor.features(queries)[rows]
    similarity, neighbours = retrieval.retrieve(extractor.features(bank), features, NEIGHBOURS, exclude)
    neighbours = neighbours.cpu().numpy()
    pixels = extractor.pixels(bank.index, bank.positions[neighbours.ravel()])
    retrieval.draw(
        extractor.pixels(queries.index, queries.positions[drawn]),
        pixels.view(*neighbours.shape, *pixels.shape[1:]),
        similarity.tolist(),
        None if labels is None else labels[drawn].tolist(),
        None if labels is None else bank.labels()[neighbours].tolist(),
        split.class_names,
        path,
    )
