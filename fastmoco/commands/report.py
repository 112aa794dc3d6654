"""`fastmoco report`: one HTML page on a run, or the comparison of several."""

from __future__ import annotations

from fastmoco.commands.report_options import ReportOptions
from fastmoco.console import make_console, say, shown_path
from fastmoco.report_page.page import make_page, write_page
from fastmoco.report_page.run_files import read_run


def report_command(options: ReportOptions) -> None:
    """Write the page and say where it is.

    Raises ConfigError if a folder is no run or the page cannot be written, CheckpointError if metrics.jsonl cannot be
    opened or the disk is full.
    """
    console, runs = make_console(), [read_run(folder) for folder in options.folders]
    for run in runs:
        for note in run.notes:
            say(console, f"{run.name}: {note}" if len(runs) > 1 else note, "yellow")
    page = make_page(runs)
    write_page(page, options.path)
    say(console, f"written {shown_path(options.path)}, {len(page.encode()) / 2**20:.1f} MiB: open it in a browser")
