"""Peak memory of the step: at most that of plain PyTorch in 16 bits, and half of that in fp32."""

from __future__ import annotations

from functools import cache

import pytest

from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@cache
def peaks() -> dict[str, dict[str, int]]:
    return run_program("memory")


@pytest.mark.parametrize("config", ["cifar", "r50"])
def test_peak_memory_is_below_that_of_plain_pytorch(config: str) -> None:
    ours, plain_bf16, plain_fp32 = (peaks()[config][name] for name in ("triton", "amp", "plain"))
    assert ours <= plain_bf16
    assert ours <= plain_fp32 / 2
