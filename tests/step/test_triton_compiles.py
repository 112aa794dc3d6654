"""Every kernel compiles for the GPU it is written for, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KERNELS = {
    "_update_kernel",
    "_part_kernel",
    "_finish_kernel",
    "statistics_kernel",
    "join_statistics_kernel",
    "normalise_kernel",
    "gradient_sums_kernel",
    "join_gradients_kernel",
    "input_gradient_kernel",
    "_crop_kernel",
    "colour_kernel",
    "blur_rows_kernel",
    "blur_columns_kernel",
}


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(require_backend: Callable[[str], None]) -> None:
    require_backend("triton")
    tests = Path(__file__).parents[1]
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tests.parent)
    script = [sys.executable, str(tests / "compile_kernels.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == KERNELS
