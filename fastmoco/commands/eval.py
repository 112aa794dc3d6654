"""`fastmoco eval`: accuracy of a backbone by several probes, collapse diagnosis and plots."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fastmoco.backbones.read import LoadedBackbone, read_backbone
from fastmoco.console import Fact, duration, form_of, make_console, say, show_facts, show_result, shown_path
from fastmoco.device import describe, pick_device
from fastmoco.errors import ConfigError, cannot_write
from fastmoco.evaluation import embedding_plot, retrieval
from fastmoco.evaluation.as_trained import decoded_as_trained, run_folder
from fastmoco.evaluation.budget import budget_bytes
from fastmoco.evaluation.confusion import Accuracy, write_confusion
from fastmoco.evaluation.confusion_plot import draw_confusion
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.projector import write_projector
from fastmoco.evaluation.report import Record, backbone_facts, show_classes, show_label_free, show_results
from fastmoco.evaluation.splits import EvaluationSplit, fit_to_budget, split_dataset
from fastmoco.evaluation.suite import Evaluation, Result
from fastmoco.output import Form
from fastmoco.run.data_facts import data_facts
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.environment import versions
from fastmoco.run.fingerprint import fingerprint
from fastmoco.run.loading import load_reported
from fastmoco.run.metrics import FILE_NAME as METRICS_NAME
from fastmoco.run.metrics import read_metrics
from fastmoco.run.outside import check_outside
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import Dataset
from pipelines.data.notes import file_name
from pipelines.files import absolute
from pipelines.randomness import Domain, permutation

NEIGHBOURS, ROWS = 8, 10  # of the retrieval picture
_TITLES = {"knn": "kNN", "knn-output": "kNN on the output", "tsne": "t-SNE", "umap": "UMAP"}


def eval_command(options: EvalOptions) -> Path:
    """Evaluate, print the results, write them to files and return their folder.

    Raises ConfigError, DataError, CheckpointError, BackendMissingError and DeviceError.
    """
    with threads_restored(options.cpu_threads), ended_by_stuck_reads():
        return _evaluate(options)


def _evaluate(options: EvalOptions) -> Path:
    began, console = time.monotonic(), make_console()
    device = pick_device(options.device)
    backbone = read_backbone(
        options.run, arch=options.arch, stem=options.stem, side=options.crop_size, prefix=options.prefix
    )
    if (failure := _failure(options.run)) is not None:
        say(console, failure, "yellow")
    options = _with_data(options, backbone)
    dataset = load_reported(options, console)
    split = fit_to_budget(split_dataset(dataset), backbone.feature_dim, budget_bytes(device))
    extractor = Extractor(backbone, options, device, console)
    evaluation = Evaluation(split, extractor, options)
    folder = _folder(options)
    show_facts(console, "fastmoco eval", _facts(backbone, dataset, split, evaluation, folder, device))
    label_free = evaluation.label_free()
    show_label_free(console, label_free)
    record = Record(
        folder / "eval.json",
        backbone=_backbone_record(backbone) | {"weights_sha256": extractor.weights_hash},
        data={"data": list(options.data), "images": split.description, "classes": list(split.class_names)}
        | {"bank": fingerprint(split.bank.index), "queries": fingerprint(split.queries.index)},
        label_free=label_free,
        versions=versions(),
    )
    try:
        files: list[str] = []
        for result in record.kept(evaluation.run(), console):
            files += _write_matrices([result], split, folder, draw=options.pictures)
            record.write(files, time.monotonic() - began, ended=False)
        show_results(console, record.results, len(split.queries), len(split.bank))
        if (line := _knn_in_training(options.run, record.results)) is not None:
            say(console, line)
        show_classes(console, record.results, split.class_names)
        files += _draw(split, extractor, options, folder, console) if options.pictures else []
        run = run_folder(options.run)
        if options.pictures and run is not None and (run / "tb").is_dir():
            write_projector(split.queries, extractor, run / "tb", labelled=not split.unlabelled)
        metrics = record.write(files, time.monotonic() - began, ended=True)
    except OSError as error:
        raise cannot_write(Path(error.filename or folder), error) from error
    written = [Fact("written", "eval.json", "all metrics"), *(Fact("", name) for name in files)]
    facts = [Fact("time", duration(time.monotonic() - began)), Fact("folder", shown_path(folder)), *written]
    summary = [Fact(r.probe, f"{r.accuracy.top1_percent:.1f} %") for r in record.results]
    if form_of(console) == Form.QUIET:  # otherwise it is in the tables above
        facts = [*(summary or [Fact("verdict", label_free.verdict)]), *facts]
    show_result(console, "done", facts, folder=str(folder), **metrics)
    return folder


def _failure(run: str) -> str | None:
    """A line for a run that failed, whose last checkpoint may be much earlier; None for other runs and files."""
    folder = run_folder(run)
    if folder is None or not (folder / "status.json").is_file():
        return None
    status = read_status(folder)
    if status["state"] != "failed":
        return None
    at = f"at step {status['step']:,} with exit code {status['exit_code']}"
    return f"this run failed {at}; what it saved before is evaluated"


def _knn_in_training(run: str, results: list[Result]) -> str | None:
    """A line that tells kNN accuracy of this evaluation from that of the run; None where there are not both."""
    folder = run_folder(run)
    if folder is None or not (folder / METRICS_NAME).is_file() or all(result.probe != "knn" for result in results):
        return None
    measured = [record for record in read_metrics(folder / METRICS_NAME) if "knn_top1_percent" in record]
    if not measured:
        return None
    last, config = measured[-1], read_config(folder)
    limit = f" (--limit {config.data.limit})" if config.data.limit is not None else ""
    return (
        f"kNN in training was {last['knn_top1_percent']:.1f} % at epoch {last['epoch']}, with the run's own bank and "
        f"queries{limit}, k {config.run.knn_k} and T {config.run.knn_t:g}: compare only what has the same ones"
    )


def _with_data(options: EvalOptions, backbone: LoadedBackbone) -> EvalOptions:
    """The options with what the run says where they say nothing: how images are decoded, and, without --data, which
    images and folders in them. Raises ConfigError."""
    options, run = decoded_as_trained(options, backbone, options.run), run_folder(options.run)
    if options.data:
        return options
    if run is not None:
        images = read_config(run).data
        folders = {name: getattr(options, name) or getattr(images, name) for name in ("train_folder", "test_folder")}
        return replace(options, data=images.data, no_labels=options.no_labels or images.no_labels, **folders)
    if backbone.data is None:
        raise ConfigError(f"{backbone.origin} does not record its training data: name the images with --data")
    return replace(options, data=(backbone.data,))


def _folder(options: EvalOptions) -> Path:
    """The output folder, created before the evaluation, so that errors show at once.

    Raises ConfigError, and CheckpointError if the disk is full.
    """
    folder = Path(absolute(options.out)) if options.out else _default_folder(options.run)
    check_outside(folder, options.data)
    if options.out is None and folder.is_symlink():
        raise ConfigError(f"{folder} is a symbolic link, which is not followed: name the folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write to {folder} (permission denied): choose another with --out")
    return folder


def _default_folder(run: str) -> Path:
    """`eval` in the run folder that `run` is or is a file of; otherwise `runs/eval-NAME`."""
    folder = run_folder(run)
    if folder is not None:
        return folder / "eval"
    name = os.path.basename(absolute(run))
    return Path("runs").absolute() / f"eval-{name.split('.')[0] or 'file'}"


def _backbone_record(backbone: LoadedBackbone) -> dict:
    names = ("arch", "stem", "width", "feature_dim", "side", "mean", "std", "origin", "data")
    return {name: getattr(backbone, name) for name in names}


def _facts(
    backbone: LoadedBackbone,
    dataset: Dataset,
    split: EvaluationSplit,
    evaluation: Evaluation,
    folder: Path,
    device: torch.device,
) -> list[Fact]:
    why = dataset.choices.evaluation
    hint = "" if evaluation.options.probes or evaluation.options.labels else "see --probes"
    no_head = "" if evaluation.extractor.projection is not None else "this file has no projection head"
    return [
        *backbone_facts(backbone),
        Fact("images", split.description, split.unlabelled),
        *data_facts(dataset)[1:-1],
        *([Fact("test split", dataset.test.name if dataset.test else "none", why)] if why else []),
        Fact("views", f"{backbone.side} pixels, centre crop"),
        Fact("probes", ", ".join(evaluation.probes) or "none, without labels", hint),
        *([Fact("kNN on", " and ".join(evaluation.knn_spaces), no_head)] if "knn" in evaluation.probes else []),
        Fact("device", f"{describe(device)}, {evaluation.options.amp}"),
        Fact("folder", str(folder)),
    ]


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_matrices(results: list[Result], split: EvaluationSplit, folder: Path, *, draw: bool) -> list[str]:
    """Write all confusion matrices as CSV, and draw them as PNG; returns the file names."""
    files = []
    for result in results:
        if isinstance(result.accuracy, Accuracy):
            name = f"confusion-{result.probe}"
            write_confusion(result.accuracy, split.class_names, folder / f"{name}.csv")
            files.append(f"{name}.csv")
            if draw:
                title = f"{_TITLES.get(result.probe, result.probe)}, top-1 {result.accuracy.top1_percent:.1f} %"
                draw_confusion(result.accuracy, split.class_names, title, folder / f"{name}.png")
                files.append(f"{name}.png")
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
    thumbnails = None
    if labels is None:
        drawn = embedding_plot.spaced(points)
        images = queries.positions[rows[drawn]]
        pixels = extractor.pixels(queries.index, images).numpy()
        thumbnails = embedding_plot.Thumbnails(drawn, pixels, [file_name(queries.index, int(i)) for i in images])
    embedding_plot.draw(points, labels, split.class_names, title, folder / "feature_map.png", thumbnails)
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
    found = bank.positions[neighbours]
    pixels = extractor.pixels(bank.index, found.ravel())
    own_files = [file_name(queries.index, int(i)) for i in queries.positions[drawn]]
    retrieval.draw(
        extractor.pixels(queries.index, queries.positions[drawn]),
        pixels.view(*neighbours.shape, *pixels.shape[1:]),
        similarity.tolist(),
        None if labels is None else labels[drawn].tolist(),
        None if labels is None else bank.labels()[neighbours].tolist(),
        split.class_names,
        path,
        files=(own_files, [[file_name(bank.index, int(i)) for i in row] for row in found]),
    )
