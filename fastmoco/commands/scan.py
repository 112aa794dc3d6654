"""fastmoco scan: reads every image of a data set once, says what is there, and saves what training would look up."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmoco.commands.scan_options import ScanOptions
from fastmoco.console import Fact, duration, make_console, say, show_facts
from fastmoco.errors import ConfigError
from pipelines.backends.select import default_workers
from pipelines.data import manifest
from pipelines.data.dataset import MAX_BAD_FRACTION, DataFiles, find_files
from pipelines.data.manifest import ScanManifest
from pipelines.data.scan import duplicates, mean_and_std, scan
from pipelines.errors import DataError

WORTH_PROCESSES = 4_000  # files: fewer are read before processes have started, which takes seconds
SHOWN = 10  # bad files in the summary
SHOWN_DUPLICATES = 3


def scan_command(options: ScanOptions) -> None:
    """Scans, saves and says what was found. Raises ConfigError and DataError, the latter also for bad images."""
    console, began = make_console(), time.monotonic()
    files = find_files(options.data, data_root=options.data_root)
    others = files.test.paths if files.test is not None else ()
    count = len(files.train.paths) + len(others)
    workers = options.workers
    if workers is None:
        workers = default_workers() if count >= WORTH_PROCESSES else 0
    with _Progress(console, count) as progress:
        found = scan(files.train.paths, others, workers, progress.advance)
    path = _save(found, files.path, options)
    show_facts(console, "fastmoco scan", _facts(found, files, path, time.monotonic() - began))
    for line in _bad_lines(found):
        say(console, line, "yellow")
    _judge(found, files, options.bad_images)


class _Progress:
    """A bar with a rate on a terminal, and nothing elsewhere: a scan is over in minutes, and its summary says all."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (
            TextColumn("reading"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=total, rate="")
        self._began, self._done, self._bad = time.monotonic(), 0, 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, files: int, bad: int) -> None:
        self._done, self._bad = self._done + files, self._bad + bad
        rate = f"{self._done / (time.monotonic() - self._began):,.0f} images/s"
        self._bar.update(self._task, advance=files, rate=f"{rate}, {self._bad:,} bad" if self._bad else rate)


def _save(found: ScanManifest, data: str, options: ScanOptions) -> Path:
    """Writes the manifest where training looks for it, or where it was requested; returns the path."""
    place, cached = manifest.places(data, Path(options.data_root).expanduser())
    if options.out is None:
        try:
            manifest.write(found, place, data)
            return place
        except OSError:  # a read-only folder or a full disk
            place = cached
    else:
        place = Path(os.path.abspath(os.path.expanduser(options.out)))
    try:
        manifest.write(found, place, data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write {place} ({reason}): name a file on a disk with space by --out") from error
    return place


def _facts(found: ScanManifest, files: DataFiles, path: Path, seconds: float) -> list[Fact]:
    good, count = found.sizes.min(axis=1) > 0, len(found.paths)
    parts = f"{files.train_name} {len(files.train.paths):,}"
    if files.test is not None:
        parts += f", {files.test_name} {len(files.test.paths):,}"
    size_bytes = int(found.stats[:, 0].clip(min=0).sum())
    facts = [
        Fact("images", f"{_count(count, 'file')}, {_in_units(size_bytes)}", parts),
        Fact("bad", f"{len(found.bad):,}", f"{len(found.bad) / count:.2%}" if found.bad else ""),
    ]
    skipped = files.train.skipped + (files.test.skipped if files.test is not None else 0)
    if skipped:
        facts.append(Fact("passed over", _count(skipped, "file"), "not named like an image"))
    if good.any():
        facts.append(Fact("size", *_size(found.sizes[good])))
        kinds = Counter(found.kinds[good].tolist()).most_common()
        facts.append(Fact("formats", ", ".join(f"{found.kind_names[kind]} {number:,}" for kind, number in kinds)))
    if found.histogram.any():
        mean, std = mean_and_std(found.histogram)
        facts.append(
            Fact("mean", " ".join(f"{value:.4f}" for value in mean), "red, green, blue of the training images")
        )
        facts.append(Fact("std", " ".join(f"{value:.4f}" for value in std)))
    facts += _duplicate_facts(found)
    facts.append(
        Fact("time", duration(seconds) if seconds >= 10 else f"{seconds:.1f} s", f"{count / seconds:,.0f} images/s")
    )
    facts.append(Fact("saved to", str(path)))
    return facts


def _size(sizes: np.ndarray) -> tuple[str, str]:
    """In words: all the same, or the range and the median."""
    low, middle, high = (tuple(int(side) for side in row) for row in np.percentile(sizes, (0, 50, 100), axis=0))
    if low == high:
        return f"{low[1]}×{low[0]} pixels", "width×height, all the same"
    text = f"{low[1]}–{high[1]}×{low[0]}–{high[0]} pixels"
    megapixels = sizes.astype(np.int64).prod(axis=1).sum() / 1e6
    return text, f"width×height, median {middle[1]}×{middle[0]}, {megapixels:,.0f} megapixels in all"


def _duplicate_facts(found: ScanManifest) -> list[Fact]:
    groups = duplicates(found)
    if not groups:
        return [Fact("duplicates", "none", "byte for byte")]
    copies = sum(len(group) - 1 for group in groups)
    leaked = sum(1 for group in groups if 0 < found.training[group].sum() < len(group))
    why = f"{leaked:,} of them both to train and to test on" if leaked else "byte for byte"
    examples = [group[:2].tolist() for group in groups[:SHOWN_DUPLICATES]]
    return [
        Fact("duplicates", f"{_count(copies, 'copy', 'copies')} of {_count(len(groups), 'image')}", why),
        *(Fact("", found.paths[copy], f"the same as {found.paths[first]}") for first, copy in examples),
    ]


def _bad_lines(found: ScanManifest) -> list[str]:
    lines = [reason for _, reason in found.bad[:SHOWN]]
    if len(found.bad) > SHOWN:
        lines.append(f"... and {len(found.bad) - SHOWN:,} more bad files")
    return lines


def _judge(found: ScanManifest, files: DataFiles, bad_images: str) -> None:
    """Raises DataError where training with the same `--bad-images` would."""
    if not found.bad:
        return
    if bad_images == "error":
        raise DataError(
            f"{len(found.bad):,} of {len(found.paths):,} images are bad: fix or remove them, or train with "
            f"--bad-images quarantine, which leaves them out"
        )
    bad = np.array([row for row, _ in found.bad])
    for name, rows in ((files.train_name, found.training), (files.test_name, ~found.training)):
        count = int(rows[bad].sum())
        if count > MAX_BAD_FRACTION * rows.sum():
            raise DataError(
                f"{count:,} of {int(rows.sum()):,} images of {name} are bad, and at most {MAX_BAD_FRACTION:.0%} may be "
                f"left out: fix or remove them"
            )


def _in_units(size_bytes: int) -> str:
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:,.1f} MiB"
    return f"{size_bytes / 2**30:,.1f} GiB"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
