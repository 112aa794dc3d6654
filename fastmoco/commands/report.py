"""`fastmoco report`: one HTML page on a run, or the comparison of several."""

from __future__ import annotations

from fastmoco.commands.report_options import ReportOptions
from fastmoco.console import Fact, make_console, say, show_result, shown_path
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
    written = Fact("written", shown_path(options.path), f"{len(page.encode()) / 2**20:.1f} MiB; open it in a browser")
    show_result(console, "fastmoco report", [written], out=str(options.path), runs=[str(run.folder) for run in runs])
