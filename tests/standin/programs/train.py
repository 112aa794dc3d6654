"""`fastmoco train` on the stand-in: its exit code, and the runtime calls of each step and between two steps.

    python -m tests.standin.run train [--capability 7.5] [--memory BYTES] [--without triton] [--lag STEPS] \
        -- FLAGS OF FASTMOCO TRAIN

Losses, gradients and features are arbitrary numbers, since no kernel runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.standin import compiler, operators, runtime
from tests.standin.runtime import Calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--memory", type=int, default=int(85e9))
    parser.add_argument("--lag", type=int, default=0, help="steps by which the device is behind the host")
    parser.add_argument("--without", action="append", default=[], help="a package that is not found")
    parser.add_argument("--trust-values", action="store_true", help="let every comparison with plain PyTorch pass")
    parser.add_argument("--host-wait", action="store_true", help="read a value in every step, so that no capture works")
    parser.add_argument("flags", nargs="+", help="of fastmoco train")
    options = parser.parse_args()
    major, minor = map(int, options.capability.split("."))
    runtime.set_capability(major, minor)
    runtime.set_memory(options.memory)
    runtime.set_lag(options.lag)
    operators.install()
    compiler.install()
    hide_packages(options.without)
    mark_steps()
    accept_any_label()
    if options.trust_values:
        trust_values()
    if options.host_wait:
        add_host_wait()
    with runtime.CallLog() as log:
        outcome = run(["train", *options.flags])
    out = Path(options.flags[options.flags.index("--out") + 1])
    settings = json.loads((out / "config.json").read_text())["run"] if (out / "config.json").is_file() else None
    report = {"violations": runtime.violations(), "nodes": runtime.graph_nodes(), "settings": settings}
    print(json.dumps(outcome | report | {"steps": steps(log)}))


def run(arguments: list[str]) -> dict[str, Any]:
    """The exit code of a command, what it printed, and the traceback of an error that it does not handle."""
    from fastmoco.cli import main as fastmoco

    sys.argv, code, error = ["fastmoco", *arguments], 0, ""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = fastmoco() or 0
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            code, error = 1, traceback.format_exc()
    return {"exit_code": code, "output": out.getvalue(), "error": error}


def hide_packages(names: list[str]) -> None:
    """Let `find_spec` and `import` fail for these, as where they are not installed."""
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in names else original(name, package)

    importlib.util.find_spec = find_spec
    for name in names:
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]


def mark_steps() -> None:
    """Write the beginning and the end of every training step into the log."""
    from fastmoco.step.cuda_graph import GraphedStep
    from fastmoco.step.train_step import TrainStep

    marked: tuple[Any, ...] = (TrainStep, GraphedStep)
    for step in marked:

        def call(self: Any, *args: Any, original: Any = step.__call__) -> None:
            runtime.step_begins()
            try:
                original(self, *args)
            finally:
                runtime.mark("step ends")

        step.__call__ = call


def accept_any_label() -> None:
    """kNN checks the range of its labels, a result of kernels that do not run."""
    from fastmoco.evaluation import knn

    knn._check = lambda *_: None


def trust_values() -> None:
    """What `--check` compares are results of kernels that do not run."""
    from fastmoco.step.train_step import TrainStep
    from fastmoco.tuning import check

    original, read_metrics = check.relative_errors, TrainStep.read_metrics
    check.relative_errors = lambda *results: dict.fromkeys(original(*results), 0.0)
    good = {"loss": 1.0, "skipped_steps": 0, "consecutive_skipped": 0, "state_not_finite": 0}
    TrainStep.read_metrics = lambda self, **options: read_metrics(self, **options) | good


def add_host_wait() -> None:
    from fastmoco.step.train_step import TrainStep

    run = TrainStep.run

    def waiting(self: Any, views: Any) -> None:
        run(self, views)
        self.lr.item()

    TrainStep.run = waiting


def steps(log: Calls) -> list[dict[str, Any]]:
    """For each step, `summary` of the step and of what comes before the next one."""
    parts = [part.split("step ends") for part in log.split("step")[1:]]
    return [{"step": summary(step), "after": summary(after)} for step, after in parts]


def summary(calls: Calls) -> dict[str, Any]:
    """Number of calls by name, and the calls of the training threads that could hold up the device."""
    own = calls.of_step()
    return {
        "counts": calls.counts(),
        "waits": runtime.texts(own.host_waits()),
        "copies": runtime.texts(own.host_copies()),
        "allocations": runtime.texts(own.allocations()),
    }


if __name__ == "__main__":
    main()
