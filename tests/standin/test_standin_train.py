"""`fastmoco train` on the stand-in: what the host does in a step and between two steps, with every pipeline.

DALI is left out, since its own kernels cannot run here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.oddities import encode, picture
from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, BATCH, WARM_UP, LOG_EVERY = 24, 16, 8, 12
ENDING = 4  # batches are prepared ahead, so that loaders end some steps before training does
FLAGS = f"""--arch resnet18 --width 0.25 --stem cifar --crop-size 32 --batch-size {BATCH} --moco-k 64 --epochs 1
    --knn-every 0 --log-every {LOG_EVERY} --check off --tune off --kernels triton --compile off --amp bf16""".split()


def train(out: Path, data: str, *flags: str) -> dict[str, Any]:
    """The report of a run whose device is one step behind the host."""
    given = ["--data", data, "--out", str(out), "--limit", str(STEPS * BATCH), *FLAGS, *flags]
    report = run_program("train", "--lag", "1", "--", *given)
    assert report["exit_code"] == 0, report["output"] + report["error"]
    assert len(report["steps"]) == STEPS
    return report


def check_steps(report: dict[str, Any]) -> None:
    """After a few steps, the host neither waits nor allocates, except for the log."""
    for number, step in enumerate(report["steps"][WARM_UP:-ENDING], WARM_UP + 1):
        for part in ("step", "after"):
            calls = step[part]
            if part == "after" and number % LOG_EVERY == 0:
                assert len(calls["waits"]) == 2, f"reading the metrics after step {number} is one transfer: {calls}"
            else:
                assert calls["waits"] == [], f"{part} {number}"
            assert calls["allocations"] == [], f"{part} {number}"
        assert step["step"]["copies"] == [], number


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(STEPS * BATCH):
        (folder / f"{i:03}.jpg").write_bytes(encode(picture(40 + i % 7, 48), "JPEG"))
    return folder


@pytest.mark.parametrize("graph", ["on", "off"])
def test_with_images_in_device_memory(tmp_path: Path, graph: str) -> None:
    report = train(tmp_path / "run", "shapes", "--pipeline", "resident", "--cuda-graph", graph)
    check_steps(report)
    assert report["violations"] == 0
    for step in report["steps"][WARM_UP : LOG_EVERY - 1]:
        assert step["step"]["counts"].get("cudaGraphLaunch", 0) == (graph == "on")
        assert step["after"]["counts"].get("cudaMemcpyAsync", 0) <= 1, "the numbers of a batch are one copy"


def test_without_prefetching(tmp_path: Path) -> None:
    report = train(tmp_path / "run", "shapes", "--pipeline", "resident", "--prefetch", "off")
    check_steps(report)
    assert report["violations"] == 0
    assert report["settings"]["prefetch"] == "off"


def test_with_worker_processes(tmp_path: Path, photographs: Path) -> None:
    report = train(tmp_path / "run", str(photographs), "--pipeline", "torch", "--workers", "1")
    check_steps(report)
    assert report["violations"] == 0


def test_with_ffcv(tmp_path: Path, photographs: Path, require_backend: Callable[[str], None]) -> None:
    require_backend("ffcv")
    from pipelines.data.headers import read_headers
    from pipelines.data.index import ImageIndex
    from tools.make_ffcv import Settings, convert

    names = tuple(sorted(os.path.join(photographs, name) for name in os.listdir(photographs)))
    index = ImageIndex("photographs", read_headers(list(names))[0], paths=names)
    beton = str(tmp_path / "photographs.beton")
    convert(index, Settings(data=(str(photographs),), out=beton, workers=1), Console(quiet=True))
    report = train(tmp_path / "run", beton, "--pipeline", "ffcv", "--workers", "1")
    check_steps(report)
    assert report["violations"] == 0


def test_a_wait_between_two_steps_is_seen(tmp_path: Path) -> None:
    report = train(tmp_path / "run", "shapes", "--pipeline", "resident", "--log-every", "1")
    with pytest.raises(AssertionError, match="after 9"):
        check_steps(report)


def test_the_largest_batch_that_fits_trains_in_the_memory_it_was_measured_for(tmp_path: Path) -> None:
    """With a CUDA graph, which keeps the memory of a step."""
    out = tmp_path / "run"
    flags = [flag for flag in FLAGS if flag not in ("--batch-size", str(BATCH), "--moco-k", "64")]
    given = ["--data", "shapes", "--out", str(out), "--limit", "4500", *flags, "--moco-k", "4000", "--lr", "0.03"]
    report = run_program("train", "--memory", "700000000", "--", *given, "--batch-size", "auto", "--cuda-graph", "on")
    assert report["exit_code"] == 0, report["output"] + report["error"]
    memory = json.loads((out / "batch_size.json").read_text())
    assert memory["limit"] == ""
    assert 0.8 * memory["budget_bytes"] < memory["curve"][str(memory["batch"])] <= memory["budget_bytes"]
    assert max(map(int, memory["curve"])) > memory["batch"], "a larger one was tried"
    (last,) = [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in r][-1:]
    assert last["device_memory_bytes"] < memory["budget_bytes"]
