"""Runtime calls of saving one checkpoint of a run, after an earlier one has allocated the memory.

python -m tests.standin.run checkpoint FOLDER FLAGS OF FASTMOCO TRAIN
"""

from __future__ import annotations

import json
import sys

from rich.console import Console

from fastmoco.commands.train_arguments import parse_train
from fastmoco.run.recorder import RunRecorder
from fastmoco.run.start import run_context
from fastmoco.run.state import build_state
from tests.standin import operators, runtime


def main() -> None:
    folder, *flags = sys.argv[1:]
    operators.install()
    console = Console(quiet=True)
    with run_context(parse_train([*flags, "--out", folder]), console) as context:
        state = build_state(context.config, context.world, context.dataset.train)
        assert context.directory is not None
        recorder = RunRecorder(context.directory, context.config, console)
        with runtime.CallLog() as first:
            recorder.save(state, 0, last_chance=True)
        with runtime.CallLog() as log:
            recorder.save(state, 1, last_chance=False)
            recorder.finish_saving()
        recorder.close()
    print(
        json.dumps(
            {
                "tensors": len(state.tensors()),
                "first_allocations": len(first.allocations()),
                "copies": [str(copy) for copy in log.host_copies()],
                "waits": [str(wait) for wait in log.host_waits()],
                "allocations": runtime.texts(log.allocations()),
                "kernels": len(log.kernels()),
            }
        )
    )


if __name__ == "__main__":
    main()
