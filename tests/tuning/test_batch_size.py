"""--batch-size auto: the largest batch that fits, measured once, and kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastmoco.commands.train_arguments import parse_train
from fastmoco.distributed.world import World
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.run.directory import read_config
from fastmoco.run.resolve import resolve
from fastmoco.trainer import train
from fastmoco.tuning import batch_size
from fastmoco.tuning.batch_size import FINE, UNIT, fit_batch, search, step_bytes
from pipelines.data.dataset import load_dataset
from tests.run.test_train import RESIDENT
from tests.tuning.tiny import CPU, tiny_config

MB = 2**20


def affine(count: int) -> int:
    return 300 * MB + 17 * MB * count


@pytest.mark.parametrize("budget_mb", [600, 1000, 7000, 33_333, 200_000])
@pytest.mark.parametrize(
    "used",
    [
        affine,
        lambda count: affine(count) + 40 * MB * (count // 100),  # workspaces come in blocks
        lambda count: 10 * MB * count if count < 64 else 20 * MB * count,
        lambda count: 500 * MB,
    ],
)
def test_the_largest_batch_that_fits_is_found(used: Callable[[int], int], budget_mb: int) -> None:
    budget, tried, most = budget_mb * MB, [], 4096

    def measure(count: int) -> int | None:
        tried.append(count)
        return used(count) if used(count) < 1.5 * budget else None  # the rest is out of memory

    found, curve = search(measure, UNIT, most, budget)
    exact = max(count for count in range(UNIT, most + 1, UNIT) if used(count) <= budget)
    assert found <= exact <= max(found + UNIT, found * (1 + FINE))
    assert used(found) <= budget
    assert found % UNIT == 0
    assert curve == {count: used(count) for count in tried if used(count) < 1.5 * budget}
    assert len(tried) == len({*tried}) <= 16


def test_an_affine_step_takes_few_measurements() -> None:
    tried: list[int] = []
    search(lambda count: tried.append(count) or affine(count), UNIT, 4096, 40_000 * MB)
    assert len(tried) <= 7


def test_a_smallest_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not even 16 images fit into 0.4 GiB of free memory: use --checkpoint-act"):
        search(affine, UNIT, 4096, 400 * MB)
    with pytest.raises(ConfigError, match="not even 16 images fit"):
        search(lambda _: None, UNIT, 4096, 400 * MB)


def test_the_memory_of_a_step_is_measured_and_grows_with_the_batch() -> None:
    config = tiny_config(crop_size=32, width=0.5, arch="resnet18")
    few, many = (step_bytes(config, count, 64, CPU) for count in (32, 128))
    assert few is not None
    assert many is not None
    # Both views, both encoders: activations of the query encoder at half width and 32 pixels are over 100 kB an image.
    assert 100_000 < (many - few) / 96 < 10_000_000


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_no_memory_is_an_answer_and_other_errors_are_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(batch_size, "_steps", fail)
    assert step_bytes(tiny_config(), 8, 64, CPU) is None
    error = RuntimeError("expected a tensor")
    with pytest.raises(RuntimeError, match="expected a tensor"):
        step_bytes(tiny_config(), 8, 64, CPU)


def fitted(monkeypatch: pytest.MonkeyPatch, free_mb: int, ranks: int = 1, **given: object):
    """`fit_batch` on 3,000 images where a step takes 300 MB and 17 MB an image."""
    monkeypatch.setattr(batch_size, "step_bytes", lambda config, count, images, device: affine(count))
    monkeypatch.setattr(batch_size, "free_memory_bytes", lambda _: free_mb * MB)
    monkeypatch.setattr(batch_size, "MOST", {"cpu": (1024, "larger ones are not useful")})
    images = load_dataset("shapes", data_root="data", limit=3000, bad_images="error").train
    config = parse_train(["shapes", "--batch-size", "auto", "--pipeline", "torch"]).replace(
        **({"moco_k": None} | given)
    )
    world = World(CPU)
    world.size = ranks
    return fit_batch(config, lambda settings: resolve(settings, images, CPU)[0], images, world)


def test_the_choice_is_of_all_devices_and_its_limit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = fitted(monkeypatch, 4000)
    assert one.batch == one.images == 144  # 300 + 17 · 144 = 2,748 MB of 70 % of 4,000
    assert one.reason == "the largest whose step fits into 2.7 GiB"
    two = fitted(monkeypatch, 4000, ranks=2)
    assert (two.batch, two.images) == (288, 144)
    assert fitted(monkeypatch, 40_000).batch == 512  # the queue of the recipe
    assert fitted(monkeypatch, 40_000).reason == "fits, and larger ones are not tried: the queue has 512 keys"
    large = fitted(monkeypatch, 40_000, moco_k=2048)
    assert large.batch == 1024
    assert large.reason == "fits, and larger ones are not tried: larger ones are not useful"
    assert [fact.why for fact in large.facts()][-1] == "chosen"


AUTO = [*RESIDENT, "--no-tensorboard", "--knn-every", "0", "--epochs", "1"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a CPU is measured on Linux only")
def test_a_run_measures_once_and_keeps_the_number(tmp_path: Path) -> None:
    out, console = tmp_path / "run", Console(file=io.StringIO(), width=200)
    train(parse_train([*AUTO, "--batch-size", "auto", "--out", str(out)]), console)
    kept = read_config(out).optim.batch_size
    assert isinstance(kept, int)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{kept} images" in printed
    recorded = json.loads((out / "batch_size.json").read_text())
    assert recorded["batch"] == kept
    assert all(used > 0 for used in recorded["curve"].values())

    before = (out / "batch_size.json").read_bytes()
    again = ["--resume", str(out), "--batch-size", "auto", "--epochs", "2"]
    train(parse_train(again), console)
    assert read_config(out).optim.batch_size == kept
    assert (out / "batch_size.json").read_bytes() == before
    with pytest.raises(CheckpointError, match="batch-size"):
        train(parse_train(["--resume", str(out), "--batch-size", str(kept - 8)]), console)


def test_words_other_than_auto_are_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size"):
        parse_train(["shapes", "--batch-size", "most"])
