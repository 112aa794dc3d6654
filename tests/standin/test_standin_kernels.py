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
    "normalise_kernel",
    "gradient_sums_kernel",
    "input_gradient_kernel",
    "normalise_pool_kernel",
    "pool_gradient_sums_kernel",
    "pool_input_gradient_kernel",
    "_crop_kernel",
    "colour_kernel",
    "blur_rows_kernel",
    "blur_columns_kernel",
}
FUSED = {"product_kernel", "product_gradient_kernel", "matrix_gradient_kernel", "join_parts_kernel"}
FUSED_SINCE = 8.0
SUMS = {"statistics_kernel", "gradient_sums_kernel"}
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
    expected = KERNELS | FUSED if float(capability) >= FUSED_SINCE else KERNELS
    assert {kernel["kernel"] for kernel in kernels} == expected
    for kernel in kernels:
        assert kernel["stack_bytes"] == kernel["local_bytes"] == 0, f"registers are spilled: {kernel}"
        assert kernel["shared_bytes"] <= 1024 * SHARED_KIB[capability], kernel
        assert 32 * kernel["warps"] * kernel["registers"] <= REGISTERS, kernel


@pytest.mark.parametrize("capability", [name for name in SHARED_KIB if float(name) >= 7.5])
def test_the_sums_of_batch_norm_wait_for_no_other_thread(
    compiled: dict[str, list[dict[str, Any]]], capability: str
) -> None:
    """Their loops over the rows have neither barriers nor shuffles: each thread has sums of its own."""
    kernels = [kernel for kernel in compiled[capability] if kernel["kernel"] in SUMS]
    assert {kernel["kernel"] for kernel in kernels} == SUMS
    for kernel in kernels:
        assert kernel["loop_instructions"] > 0, kernel
        assert kernel["loop_barriers"] == kernel["loop_shuffles"] == 0, kernel


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_the_loss_is_multiplied_on_tensor_cores(compiled: dict[str, list[dict[str, Any]]], capability: str) -> None:
    """Except where exact products are asked for, and before sm_80."""
    kernels = [kernel for kernel in compiled[capability] if kernel["kernel"] == "_part_kernel"]
    used = [(kernel["constants"], kernel["tensor_core_instructions"]) for kernel in kernels]
    rounded = [names for constants, names in used if constants["EXACT"] == "False"]
    assert bool(rounded) == (float(capability) >= 8.0)
    assert all(rounded), used
    assert not any(names for constants, names in used if constants["EXACT"] == "True")
    if capability == "9.0":  # the instructions of four warps, of which a block has at least 64 queries
        assert {tuple(names) for constants, names in used if constants["BLOCK_N"] in ("64", "128")} >= {
            ("wgmma.mma_async",)
        }
