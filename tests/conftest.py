"""What every test shares: real images where there are any, and what to do about a backend or a GPU that is missing.

Tests run on the CPU, whether or not there is a GPU; `-m gpu` runs those of the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.deterministic

MODULES = {"dali": "nvidia.dali", "ffcv": "ffcv", "onnx": "onnxruntime", "triton": "triton"}
MODULES |= {"parquet": "pyarrow", "wandb": "wandb", "mlflow": "mlflow", "lightly": "lightly", "selenium": "selenium"}
MODULES |= {"site": "material", "notebook": "nbclient"}
MEMORY: Any = torch.utils.deterministic


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-backends", action="store_true", help="a missing backend fails a test, not skips it")
    parser.addoption("--require-gpu", action="store_true", help="a missing GPU fails the GPU tests, not skips them")


def pytest_configure(config: pytest.Config) -> None:
    if not tests_the_gpu(config):  # before anything starts CUDA or imports Triton; subprocesses inherit it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # its kernels then run on the CPU
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as in plain torch on the CPU


def tests_the_gpu(config: pytest.Config) -> bool:
    return bool(re.search(r"(?<!not )\bgpu\b", config.getoption("-m") or ""))


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if tests_the_gpu(config):
        for item in items:
            if item.get_closest_marker("any_device"):
                item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        needed = "needs a CUDA device, "
        reason = needed + ("and torch finds none" if tests_the_gpu(item.config) else "where it runs with -m gpu")
        if item.config.getoption("--require-gpu"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def determinism_restored() -> Iterator[None]:
    """A run with --deterministic changes these settings of the process."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), MEMORY.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)
    MEMORY.fill_uninitialized_memory = fill


@pytest.fixture
def poisoned_memory(determinism_restored: None) -> None:
    """New memory holds NaN or the largest integer, so that an element which nothing wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    MEMORY.fill_uninitialized_memory = True


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
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run on shapes: two steps of the smallest network. Tests only read it."""
    from fastmoco.cli import main  # after `pytest_configure`
    from tests.commands.test_cli import TINY

    out = tmp_path_factory.mktemp("runs") / "shapes"
    assert main(["train", *TINY, "--cpu-threads", "1", "--crop-size", "16", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images (cifar10, imagenette, imagenet-60)."""
    folder = os.environ.get("FASTMOCO_TEST_DATA")
    if not folder:
        pytest.skip("FASTMOCO_TEST_DATA is not set: no real images to test on")
    path = Path(folder)
    assert path.is_dir(), f"FASTMOCO_TEST_DATA is {folder}, and there is no such folder"
    return path
