"""The error of an implementation against that of plain PyTorch, both measured against float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastmoco.doctor.findings import Finding, Status
from fastmoco.doctor.units import si

SLACK = 1.5  # times the error of plain PyTorch, since both are roundings of random numbers
LIMIT = 0.02  # should plain PyTorch be wrong on this device too; bfloat16 gives 4e-3
ADVICE = "training on this device gives wrong results: please report it with the output of fastmoco doctor --json"


class Errors(NamedTuple):
    """The output with the largest error relative to what is allowed, and the dtype it was computed in."""

    output: str
    error: float
    allowed: float
    dtype: str = "float32"

    @property
    def excess(self) -> float:
        """Error over allowed error; infinite if it is not a number."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed


def worst(
    found: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, floor: float, dtype: str
) -> Errors:
    """Of all outputs by name. An error is ‖a − exact‖ / ‖exact‖; allowed is SLACK · that of `plain` + `floor`.

    exact  on the CPU, from inputs that have not been on the device
    """
    assert found.keys() == plain.keys() == exact.keys(), (found.keys(), plain.keys(), exact.keys())
    errors = []
    for name, truth in exact.items():
        allowed = SLACK * relative_error(plain[name], truth) + floor
        allowed = allowed if allowed < LIMIT else LIMIT  # also if it is not a number
        errors.append(Errors(name, relative_error(found[name], truth), allowed, dtype))
    return max(errors, key=lambda e: e.excess)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64, computed on the CPU whatever the device can do."""
    found, exact = found.cpu().double(), exact.cpu().double()
    return ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def verdict(
    implementation: str,
    errors: Errors,
    *,
    seconds: float,
    moved_bytes: int,
    plain_seconds: float | None = None,
    advice: str = ADVICE,
) -> Finding:
    """The finding for an implementation: its error, and as its rate the bytes that it must move over its time.

    plain_seconds  the time of the same work in plain PyTorch, if that was measured
    """
    figures = {
        "implementation": implementation,
        **errors._asdict(),
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "moved_bytes": moved_bytes,
        "bytes_per_s": moved_bytes / seconds,
    }
    rate = f"{si(seconds, 's')}, {si(moved_bytes / seconds, 'B/s')}"
    if plain_seconds is not None:
        rate += f", {plain_seconds / seconds:.2f} times the speed of plain PyTorch"
    if errors.excess <= 1:
        text = f"{implementation}: error {errors.error:.1e} ({errors.allowed:.1e} allowed), {rate}"
        return Finding(text=text, figures=figures)
    text = (
        f"{implementation} is wrong: error {errors.error:.1e} in {errors.output} ({errors.dtype}), and allowed are "
        f"{errors.allowed:.1e}"
    )
    return Finding(status=Status.FAILED, text=text, figures=figures, advice=advice)
