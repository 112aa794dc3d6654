"""What every training step must satisfy, as assertions on the report of `programs/step.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

BUDGETS = Path(__file__).with_name("budgets.json")
UPDATE = "if that is intended: python -m tests.standin.budgets"
VIEWS = 4  # tensors of a batch, which are copied into the graph's inputs
SCALARS = 2  # learning rate and EMA momentum, which are filled in
MARGIN = 1.1  # another version of torch launches other kernels

# One process each, since importing torch takes longer than a mode.
FAST = ("cifar", "fp16")
OTHERS = (
    *("fp32", "torch", "torch-fp32", "torch-fp16", "one-group", "torch-one-group", "symmetric", "end-to-end"),
    *("memory-bank", "checkpointed", "half-gradients", "contiguous-stem", "deterministic", "torch-deterministic"),
    *("imagenet", "imagenet-fused", "imagenet-fp16", "imagenet-torch", "imagenet-checkpointed"),
)
COMPILED = ("compiled", "compiled-torch", "compiled-symmetric", "compiled-contiguous-stem", "imagenet-compiled")
GROUPS = (FAST, OTHERS, COMPILED)


def budgets() -> dict[str, Any]:
    return json.loads(BUDGETS.read_text())


def torch_version() -> str:
    """Major and minor version."""
    return ".".join(torch.__version__.split(".")[:2])


def numbers(report: dict[str, Any]) -> dict[str, int]:
    """The counts of a step that are kept in `budgets.json`."""
    eager = report["eager"]
    return {
        "launches": eager["launches"],
        "device_copies": eager["device_copies"],
        "graph_nodes": report["graph"]["nodes"],
    }


def check_eager_step(report: dict[str, Any]) -> None:
    """The host neither waits nor copies nor allocates, and all kernels are in one stream."""
    eager = report["eager"]
    assert "error" not in eager, eager["error"]
    found = {name: eager[name] for name in ("waits", "host_copies", "allocations")}
    assert not any(found.values()), found
    assert eager["streams"] == 1
    copies = report["reading"]["host_copies"]
    assert len(copies) == 1, f"read_metrics is one transfer, and it made {copies}"


def check_graph(report: dict[str, Any]) -> None:
    """The capture is legal and holds all work; a replay is one launch after the copies of its inputs."""
    assert "error" not in report["graph"], report["graph"]["error"]
    capture, replay = report["graph"], report["replay"]
    assert capture["violations"] == 0
    assert capture["host_copies"] == [], "a replay would copy what the host's memory holds then"
    assert capture["outside"] == [], "this would be missing in the replay"
    assert replay["graphs"] == 1
    assert (replay["launches"], replay["device_copies"]) == (SCALARS, VIEWS)
    found = {name: replay[name] for name in ("waits", "host_copies", "allocations")}
    assert not any(found.values()), found


def check_budget(mode: str, report: dict[str, Any]) -> None:
    """The counts are those of `budgets.json`; with another version of torch, at most a tenth above them."""
    kept, found = budgets(), numbers(report)
    expected = kept["steps"][mode]
    if kept["torch"] == torch_version():
        assert found == expected, f"the step of {mode} has other counts than budgets.json; {UPDATE}"
    else:
        above = {name: count for name, count in found.items() if count > MARGIN * expected[name]}
        assert not above, f"the step of {mode} was {expected} with torch {kept['torch']}; {UPDATE}"
