"""`fastmoco scan`: decode every image of a data set once, print statistics and save a manifest for training."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.commands.scan_options import ScanOptions
from fastmoco.console import Fact, duration, make_console, say, show_result
from fastmoco.errors import ConfigError
from fastmoco.progress import Counted
from fastmoco.run.data_facts import choice_facts
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from pipelines.backends.select import default_workers
from pipelines.data import manifest
from pipelines.data.dataset import MAX_BAD_FRACTION, DataFiles, find_files
from pipelines.data.decode import printable
from pipelines.data.manifest import ScanManifest
from pipelines.data.notes import lines_of
from pipelines.data.scan import duplicates, mean_and_std, scan
from pipelines.data.splits import within
from pipelines.errors import DataError
from pipelines.files import absolute, is_full

MIN_FILES_FOR_WORKERS = 4_000  # fewer are read before worker processes have started, which takes seconds
MAX_BAD_SHOWN, MAX_DUPLICATES_SHOWN = 10, 3


@ended_by_stuck_reads()
def scan_command(options: ScanOptions) -> None:
    """Scan, save the manifest and print a summary. Raises ConfigError and DataError, the latter also for bad images."""
    for data in options.data:
        _scan(data, options)


def _scan(data: str, options: ScanOptions) -> None:
    console, began = make_console(), time.monotonic()
    files = find_files(data, **options.finding())
    test = None if files.test is None else within(files.test, options.limit)
    files = replace(files, train=within(files.train, options.limit), test=test)
    test_paths = files.test.paths if files.test is not None else ()
    count = len(files.train.paths) + len(test_paths)
    workers = options.workers
    if workers is None:
        workers = default_workers() if count >= MIN_FILES_FOR_WORKERS else 0
    bad = 0

    def scanned_more(more: int, bad_more: int) -> None:
        nonlocal bad
        bad += bad_more
        progress.advance(more, f"{bad:,} bad" if bad else "")

    with Counted(console, f"reading {files.train_name}", count) as progress:
        scanned = scan(files.train.paths, test_paths, workers, scanned_more, options.decoding)
    path = _save(scanned, files.path, options)
    copies = duplicates(scanned)
    facts = _facts(scanned, files, copies, path, time.monotonic() - began)
    show_result(console, "fastmoco scan", facts, **_values(scanned, copies, path))
    tolerated = [(scanned.paths[row], fault) for row, fault in scanned.tolerated]
    for line in _bad_lines(scanned) + lines_of(tolerated, scanned.span(), scanned.decoding):
        say(console, line, "yellow")
    _check_bad(scanned, files, options.bad_images)


def _values(scanned: ScanManifest, copies: list[np.ndarray], path: Path) -> dict[str, Any]:
    """What --json prints."""
    mean, std = mean_and_std(scanned.histogram) if scanned.histogram.any() else (None, None)
    return {
        "images": len(scanned.paths),
        "bad": [{"path": scanned.paths[row], "reason": reason} for row, reason in scanned.bad],
        "mean": None if mean is None else [float(value) for value in mean],
        "std": None if std is None else [float(value) for value in std],
        "duplicates": [[scanned.paths[row] for row in group.tolist()] for group in copies],
        "out": str(path),
    }


def _save(scanned: ScanManifest, data: str, options: ScanOptions) -> Path:
    """Write the manifest where training looks for it, or to --out; returns the path."""
    beside_images, in_cache = manifest.places(data, Path(options.data_root).expanduser())
    if options.out is None:
        try:
            manifest.write(scanned, beside_images, data)
            return beside_images
        except OSError:  # a read-only folder or a full disk
            path = in_cache
    else:
        path = Path(absolute(options.out))
    try:
        manifest.write(scanned, path, data)
    except OSError as error:
        text = f"cannot write {path} ({error.strerror or error})"
        if is_full(error):
            raise DataError(f"{text}: free space, or choose another disk with --out") from error
        raise ConfigError(f"{text}: choose a writable file with --out") from error
    return path


def _facts(scanned: ScanManifest, files: DataFiles, copies: list[np.ndarray], path: Path, seconds: float) -> list[Fact]:
    good, count = scanned.sizes.min(axis=1) > 0, len(scanned.paths)
    splits = f"{files.train_name} {len(files.train.paths):,}"
    if files.test is not None:
        splits += f", {files.test_name} {len(files.test.paths):,}"
    size_bytes = int(scanned.stats[:, 0].clip(min=0).sum())
    facts = [
        Fact("images", f"{_count(count, 'file')}, {_format_bytes(size_bytes)}", splits),
        Fact("bad", f"{len(scanned.bad):,}", f"{len(scanned.bad) / count:.2%}" if scanned.bad else ""),
    ]
    facts[1:1] = choice_facts(files.choices, len(files.train.class_names()))
    if files.choices.evaluation:
        facts.append(Fact("test split", files.test_name or "none", files.choices.evaluation))
    if good.any():
        facts.append(Fact("size", *_describe_sizes(scanned.sizes[good])))
        kinds = Counter(scanned.kinds[good].tolist()).most_common()
        facts.append(Fact("formats", ", ".join(f"{scanned.kind_names[kind]} {number:,}" for kind, number in kinds)))
    if scanned.histogram.any():
        mean, std = mean_and_std(scanned.histogram)
        channels = "red, green, blue" if len(mean) == 3 else "grey" if len(mean) == 1 else f"the {len(mean)} bands"
        facts.append(Fact("mean", " ".join(f"{value:.4f}" for value in mean), f"{channels} of the training images"))
        facts.append(Fact("std", " ".join(f"{value:.4f}" for value in std), "both used by --normalization scan"))
    facts += _duplicate_facts(scanned, copies)
    facts.append(
        Fact("time", duration(seconds) if seconds >= 10 else f"{seconds:.1f} s", f"{count / seconds:,.0f} images/s")
    )
    facts.append(Fact("saved to", str(path)))
    return facts


def _describe_sizes(sizes: np.ndarray) -> tuple[str, str]:
    """The common size of all images, or the range and the median."""
    low, median, high = (tuple(int(side) for side in row) for row in np.percentile(sizes, (0, 50, 100), axis=0))
    if low == high:
        return f"{low[1]}×{low[0]} pixels", "width×height, all the same"
    text = f"{low[1]}–{high[1]}×{low[0]}–{high[0]} pixels"
    megapixels = sizes.astype(np.int64).prod(axis=1).sum() / 1e6
    return text, f"width×height, median {median[1]}×{median[0]}, {megapixels:,.0f} megapixels in total"


def _duplicate_facts(scanned: ScanManifest, groups: list[np.ndarray]) -> list[Fact]:
    if not groups:
        return [Fact("duplicates", "none", "byte for byte")]
    copies = sum(len(group) - 1 for group in groups)
    leaked = sum(1 for group in groups if 0 < scanned.training[group].sum() < len(group))
    why = f"{leaked:,} of them both to train and to test on" if leaked else "byte for byte"
    examples = [group[:2].tolist() for group in groups[:MAX_DUPLICATES_SHOWN]]
    return [
        Fact("duplicates", f"{_count(copies, 'copy', 'copies')} of {_count(len(groups), 'image')}", why),
        *(Fact("", scanned.paths[copy], f"the same as {scanned.paths[first]}") for first, copy in examples),
    ]


def _bad_lines(scanned: ScanManifest) -> list[str]:
    other_bands = dict(scanned.bands)
    bad = [reason for row, reason in scanned.bad if row not in other_bands]
    lines = bad[:MAX_BAD_SHOWN]
    if len(bad) > MAX_BAD_SHOWN:
        lines.append(f"... and {len(bad) - MAX_BAD_SHOWN:,} more bad files")
    for bands, count in Counter(other_bands.values()).most_common():
        first = next(row for row, found in scanned.bands if found == bands)
        lines.append(
            f"{_count(count, 'image')} of {_count(bands, 'band')}, where --channels is {scanned.decoding.channels}: "
            f"give --channels {bands} ({'e.g. ' * (count > 1)}{printable(os.path.basename(scanned.paths[first]))})"
        )
    return lines


def _check_bad(scanned: ScanManifest, files: DataFiles, bad_images: str) -> None:
    """Raise DataError if training with the same `--bad-images` would."""
    if not scanned.bad:
        return
    if bad_images == "error":
        raise DataError(
            f"{len(scanned.bad):,} of {len(scanned.paths):,} images are bad: fix or remove them, or train with "
            f"--bad-images quarantine, which skips them"
        )
    bad = np.array([row for row, _ in scanned.bad])
    for name, rows in ((files.train_name, scanned.training), (files.test_name, ~scanned.training)):
        count = int(rows[bad].sum())
        if count > MAX_BAD_FRACTION * rows.sum():
            raise DataError(
                f"{count:,} of {int(rows.sum()):,} images of {name} are bad, and at most {MAX_BAD_FRACTION:.0%} may be "
                f"left out: fix or remove them"
            )


def _format_bytes(size_bytes: int) -> str:
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:,.1f} MiB"
    return f"{size_bytes / 2**30:,.1f} GiB"


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
