"""Implementations that are wrong or cannot be built. Imports nothing of ours: that is done after pytest's set-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture
def implementation(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Any], None] | Exception]:
    """Stands for Triton and compiled encoders by torch's: {name: fault, or error when it is built}."""
    from fastmoco.tuning import check, select

    faults: dict[str, Callable[[Any], None] | Exception] = {}
    build = check.build_for

    def build_for(candidate, *args):
        names = [candidate.kernels, candidate.compile, candidate.amp, candidate.stem_format]
        found = [faults[name] for name in names if name in faults]
        for fault in found:
            if isinstance(fault, Exception):
                raise fault
        step = build(replace(candidate, kernels="torch", compile="off"), *args)
        for fault in found:
            if not isinstance(fault, Exception):
                fault(step)
        return step

    monkeypatch.setattr(check, "build_for", build_for)
    monkeypatch.setattr(select, "build_for", build_for)
    return faults
