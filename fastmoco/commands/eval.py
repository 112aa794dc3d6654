"""fastmoco eval: what the features of a backbone are worth, by several probes, in numbers and in pictures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fastmoco.console import Fact, duration, make_console, say, show_facts
from fastmoco.device import describe, pick_device
from fastmoco.errors import ConfigError
from fastmoco.evaluation import confusion, embedding_plot, retrieval
from fastmoco.evaluation.confusion import Accuracy
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.report import show_classes, show_label_free, show_results, write_json
from fastmoco.evaluation.splits import Sets, split
from fastmoco.evaluation.suite import Evaluation, Result
from fastmoco.export.read import LoadedBackbone, read_backbone
from fastmoco.run.environment import versions
from fastmoco.run.fingerprint import fingerprint
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import load_dataset
from pipelines.randomness import Domain, permutation

NEIGHBOURS, ROWS = 8, 10  # in the picture of neighbours
_TITLES = {"knn": "kNN", "tsne": "t-SNE", "umap": "UMAP"}


def eval_command(options: EvalOptions) -> None:
    """Evaluates, says what was found and writes it down.

    Raises ConfigError, DataError, CheckpointError, BackendMissingError and DeviceError.
    """
    with threads_restored(options.cpu_threads):
        _evaluate(options)


def _evaluate(options: EvalOptions) -> None:
    began, console = time.monotonic(), make_console()
    device = pick_device(options.device)
    backbone = read_backbone(options.run, arch=options.arch, stem=options.stem, side=options.crop_size)
    data = options.data or backbone.data
    if data is None:
        raise ConfigError(f"{backbone.origin} does not say what it was trained on: name the images with --data")
    dataset = load_dataset(data, data_root=options.data_root, limit=options.limit, bad_images=options.bad_images)
    sets = split(dataset)
    extractor = Extractor(backbone, options, device, console)
    evaluation = Evaluation(sets, extractor, options)
    folder = _folder(options)
    show_facts(console, "fastmoco eval", _facts(backbone, sets, evaluation, folder, device))
    results = list(evaluation.run())
    label_free = evaluation.label_free()
    show_results(console, results)
    show_classes(console, results, sets.class_names)
    show_label_free(console, label_free)
    try:
        files = _write_matrices(results, sets, folder)
        files += _draw(sets, extractor, options, folder, console) if options.pictures else []
        write_json(
            folder / "eval.json",
            backbone=_about(backbone) | {"weights_sha256": extractor.weights_hash},
            data={"data": data, "images": sets.words, "classes": list(sets.class_names)}
            | {"bank": fingerprint(sets.bank.index), "queries": fingerprint(sets.queries.index)},
            results=results,
            label_free=label_free,
            files=files,
            versions=versions(),
            seconds=time.monotonic() - began,
        )
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror or error}): choose another with --out") from error
    written = [Fact("written", "eval.json", "every number, for programs"), *(Fact("", name) for name in files)]
    facts = [Fact("time", duration(time.monotonic() - began)), Fact("folder", os.path.relpath(folder)), *written]
    show_facts(console, "done", facts)


def _folder(options: EvalOptions) -> Path:
    """Where to write, made now: before hours of work, not after. Raises ConfigError."""
    folder = Path(os.path.abspath(os.path.expanduser(options.out))) if options.out else _usual_folder(options.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder} ({error.strerror or error}): choose another with --out") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write to {folder} (permission denied): choose another with --out")
    return folder


def _usual_folder(run: str) -> Path:
    """`eval` in the folder of the run that a path is, or is part of; else a folder of its own in `runs`."""
    path = Path(os.path.abspath(os.path.expanduser(run)))
    homes = [path, path.parent, *([path.parent.parent] if path.parent.name == "checkpoints" else [])]
    home = next((home for home in homes if (home / "config.json").is_file()), None)
    return home / "eval" if home is not None else Path("runs").absolute() / f"eval-{path.name.split('.')[0] or 'file'}"


def _about(backbone: LoadedBackbone) -> dict:
    names = ("arch", "stem", "width", "feature_dim", "side", "mean", "std", "origin", "data")
    return {name: getattr(backbone, name) for name in names}


def _facts(
    backbone: LoadedBackbone, sets: Sets, evaluation: Evaluation, folder: Path, device: torch.device
) -> list[Fact]:
    width = f" × {backbone.width:g}" if backbone.width != 1 else ""
    usual = "" if evaluation.options.probes or evaluation.options.labels else "see --probes"
    return [
        Fact("backbone", f"{backbone.arch}{width}, {backbone.stem} stem, {backbone.feature_dim:,} features"),
        Fact("from", backbone.origin),
        Fact("images", sets.words, sets.unlabelled),
        Fact("views", f"{backbone.side} pixels, centred"),
        Fact("probes", ", ".join(evaluation.probes) or "none, without labels", usual),
        Fact("device", f"{describe(device)}, {evaluation.options.amp}"),
        Fact("folder", str(folder)),
    ]


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_matrices(results: list[Result], sets: Sets, folder: Path) -> list[str]:
    """CSV files of all confusion matrices, and pictures."""
    files = []
    for result in results:
        if isinstance(result.found, Accuracy):
            name = f"confusion-{result.probe}"
            title = f"{_TITLES.get(result.probe, result.probe)}, top-1 {result.found.top1_percent:.1f} %"
            confusion.write_csv(result.found, sets.class_names, folder / f"{name}.csv")
            confusion.draw(result.found, sets.class_names, title, folder / f"{name}.png")
            files += [f"{name}.csv", f"{name}.png"]
    return files


def _draw(sets: Sets, extractor: Extractor, options: EvalOptions, folder: Path, console: Console) -> list[str]:
    """The neighbours, and the map where there are points enough."""
    _draw_neighbours(sets, extractor, folder / "retrieval.png")
    drawn = np.sort(permutation(0, Domain.SUBSET, len(sets.queries))[: embedding_plot.MAX_POINTS])
    if len(drawn) < embedding_plot.LEAST_POINTS:
        say(console, f"no map of {len(drawn)} images: it takes {embedding_plot.LEAST_POINTS} or more", "yellow")
        return ["retrieval.png"]
    features = extractor.features(sets.queries)[torch.from_numpy(drawn).to(extractor.device)]
    points = embedding_plot.project(features, options.map, options.seed)
    labels = None if sets.unlabelled else sets.queries.labels()[drawn]
    title = f"{_TITLES[options.map]} of {len(drawn):,} images of {sets.queries.index.name}"
    embedding_plot.draw(points, labels, sets.class_names, title, folder / "feature_map.png")
    return ["retrieval.png", "feature_map.png"]


def _draw_neighbours(sets: Sets, extractor: Extractor, path: Path) -> None:
    bank, queries = sets.bank, sets.queries
    labels = None if sets.unlabelled else queries.labels()
    asks = retrieval.examples(labels, len(queries), ROWS)
    rows = torch.from_numpy(asks).to(extractor.device)
    own = rows if sets.unlabelled else None  # the bank holds the queries themselves
    similarity, found = retrieval.nearest(extractor.features(bank), extractor.features(queries)[rows], NEIGHBOURS, own)
    found = found.cpu().numpy()
    pixels = extractor.pixels(bank.index, bank.positions[found.ravel()])
    retrieval.draw(
        extractor.pixels(queries.index, queries.positions[asks]),
        pixels.view(*found.shape, *pixels.shape[1:]),
        similarity.tolist(),
        None if labels is None else labels[asks].tolist(),
        None if labels is None else bank.labels()[found].tolist(),
        sets.class_names,
        path,
    )
