"""Images of a command, with what is said while they are indexed."""

from __future__ import annotations

from rich.console import Console

from fastmoco.config.data import ImagesConfig
from fastmoco.console import say
from fastmoco.progress import reported
from pipelines.data.dataset import load_dataset
from pipelines.data.index import Dataset
from pipelines.data.notes import decoding_lines


def load_reported(options: ImagesConfig, console: Console) -> Dataset:
    """`load_dataset` with progress, and with warnings of how images are decoded. Raises DataError."""
    with reported(console, "reading headers") as progress:
        dataset = load_dataset(options.data, **options.loading(), progress=progress)
    for line in decoding_lines(dataset):
        say(console, line, "yellow")
    return dataset
