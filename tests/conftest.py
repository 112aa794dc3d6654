"""What every test shares: real images where there are any, and what to do about a backend or a GPU that is missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU

MODULES = {"dali": "nvidia.dali", "ffcv": "ffcv", "onnx": "onnxruntime", "triton": "triton"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-backends", action="store_true", help="a missing backend fails a test, not skips it")
    parser.addoption("--require-gpu", action="store_true", help="a missing GPU fails the GPU tests, not skips them")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        reason = "needs a CUDA device, and torch finds none"
        if item.config.getoption("--require-gpu"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def require_backend(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a name of MODULES: skips the test where that is not installed, or fails it if so asked."""

    def require(name: str) -> None:
        parents = MODULES[name].split(".")
        found = all(importlib.util.find_spec(".".join(parents[: n + 1])) for n in range(len(parents)))
        if found:
            return
        reason = f"{MODULES[name]} is not installed"
        if request.config.getoption("--require-backends"):
            pytest.fail(reason)
        pytest.skip(reason)

    return require


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images (cifar10, imagenette, imagenet-60)."""
    folder = os.environ.get("FASTMOCO_TEST_DATA")
    if not folder:
        pytest.skip("FASTMOCO_TEST_DATA is not set: no real images to test on")
    path = Path(folder)
    assert path.is_dir(), f"FASTMOCO_TEST_DATA is {folder}, and there is no such folder"
    return path
