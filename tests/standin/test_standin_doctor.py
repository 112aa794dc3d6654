"""`fastmoco doctor` on a device on which nothing is computed: what needs it fails, each part in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastmoco.errors import ExitCode
from tests.standin.run import ROOT, environment

NEEDS_NO_GPU = {"software", "processor", "memory", "shared memory", "open files", "disk", "gloo"}
COMPUTES = {"device", "arithmetic", "batch norm", "InfoNCE", "SGD and EMA", "colour", "crop", "training step"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_device_that_computes_nothing_is_found_by_every_part() -> None:
    """The libraries of the stand-in have neither cuBLAS nor cuDNN, and no kernel runs: all such parts are tried."""
    done = subprocess.run(
        [sys.executable, "-m", "fastmoco", "doctor", "--json"],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.DEVICE, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    by_name = {entry["name"]: entry for entry in report["checks"]}
    assert report["device"] == "cuda:0"
    assert {name for name in NEEDS_NO_GPU if by_name[name]["status"] != "ok"} == set()
    failed = {name for name, entry in by_name.items() if entry["status"] == "failed"}
    assert failed >= COMPUTES
    assert all(by_name[name]["text"] and "\n" not in by_name[name]["text"] for name in failed)
    assert by_name["device"]["text"].endswith("is faulty: the sum of 8 ones is 0")
    assert report["use"]["device"] == "cuda:0"
