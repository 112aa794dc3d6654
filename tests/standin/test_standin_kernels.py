"""Every Triton kernel, compiled for every GPU that torch supports as training launches it: no spills, and it fits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
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
# Shared memory that one block may use, in KiB, by compute capability.
SHARED_KIB = {"7.0": 96, "7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def compiled(require_backend: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """The kernels by compute capability, compiled in two processes at a time."""
    require_backend("triton")
    halves = ("9.0", "7.0", "8.0"), ("7.5", "8.6", "8.9", "10.0", "12.0")
    with ThreadPoolExecutor(len(halves)) as pool:
        reports = list(pool.map(lambda half: run_program("kernels", *half, timeout_s=1400), halves))
    kernels = [kernel for report in reports for kernel in report["kernels"]]
    return {name: [k for k in kernels if k["architecture"] == 10 * float(name)] for name in SHARED_KIB}


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_compiles_and_fits(compiled: dict[str, list[dict[str, Any]]], capability: str) -> None:
    kernels = compiled[capability]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["stack_bytes"] == kernel["local_bytes"] == 0, f"registers are spilled: {kernel}"
        assert kernel["shared_bytes"] <= 1024 * SHARED_KIB[capability], kernel
        assert 32 * kernel["warps"] * kernel["registers"] <= REGISTERS, kernel
