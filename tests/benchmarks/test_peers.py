"""The peers: their losses, queues, averages and images, and the script."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks import compare_peers as peers
from benchmarks.measure.plain import Task
from benchmarks.measure.sample_data import generate_jpegs, open_index
from benchmarks.measure.variants import synthetic_views
from benchmarks.peers.demo import EPOCHS, DemoStep, default_loading, demo_dataset
from benchmarks.peers.lightly import LightlyStep, lightly_dataset
from benchmarks.peers.loader import LabelledImages, Loading, decoded, endless_views, tuned
from fastmoco.errors import ConfigError
from pipelines.augment.presets import CIFAR
from pipelines.data.index import ImageIndex
from pipelines.views import Views

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TASK = Task(arch="resnet18", stem="cifar", side=8, batch_size=8, queue=32, bn_splits=2)
needs_lightly = pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("images")
    generate_jpegs(folder / "generated", 20, (32, 32))
    return open_index(str(folder / "generated"), 8, None, folder)


def views() -> Views:
    torch.manual_seed(1)
    return synthetic_views(TASK, CPU, torch.float32, channels_last=False)[0]


def info_nce(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """q and k (N, C), queue (C, K)."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / TASK.temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def first_step(step: Any, queue: Tensor, batch: Views, *, symmetric: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Expected loss of the first step, and the weights after it: p - lr (g + wd p)."""
    encoder = copy.deepcopy(step.query)
    q, k = F.normalize(encoder(batch.query), dim=1), F.normalize(step.key(batch.key), dim=1).detach()
    loss = info_nce(q, k, queue)
    if symmetric:
        q, k = F.normalize(encoder(batch.key), dim=1), F.normalize(step.key(batch.query), dim=1).detach()
        loss = loss + info_nce(q, k, queue)
    loss.backward()
    weights = [(p - TASK.lr * (p.grad + TASK.weight_decay * p)).detach() for p in encoder.parameters()]
    return loss.detach(), weights


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_first_step_of_the_demo_is_infonce_and_sgd(symmetric: bool) -> None:
    torch.manual_seed(0)
    step, batch = DemoStep(TASK, CPU, steps_per_epoch=5, symmetric=symmetric), views()
    step.query.eval()  # running statistics: an embedding does not depend on the rest of the batch
    step.key.eval()
    keys = [F.normalize(step.key(x), dim=1) for x in ([batch.query] if symmetric else []) + [batch.key]]
    loss, weights = first_step(step, step.queue.clone(), batch, symmetric=symmetric)
    step(batch)
    assert step.read_loss() == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close([p.detach() for p in step.query.parameters()], weights, rtol=1e-4, atol=1e-6)
    assert int(step.pointer) == sum(map(len, keys)) == TASK.batch_size * (2 if symmetric else 1)
    torch.testing.assert_close(step.queue[:, : int(step.pointer)], torch.cat(keys).T)


@pytest.mark.slow
@needs_lightly
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_first_step_of_lightly_is_infonce_and_sgd(symmetric: bool) -> None:
    torch.manual_seed(0)
    step, batch = LightlyStep(TASK, CPU, symmetric=symmetric), views()
    step.query.eval()
    step.key.eval()
    bank = step._criterion.memory_bank.bank
    if symmetric:  # its second loss sees the first one's keys in the bank
        with torch.no_grad():
            q, k = (F.normalize(step.query(x), dim=1) for x in (batch.query, batch.key))
        after = torch.cat([k, bank[len(k) :]])
        expected = (info_nce(q, k, bank.T) + info_nce(k, q, after.T)) / 2
        step(batch)
        assert step.read_loss() == pytest.approx(float(expected), rel=1e-5)
        return
    loss, weights = first_step(step, bank.T.clone(), batch)
    step(batch)
    assert step.read_loss() == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close([p.detach() for p in step.query.parameters()], weights, rtol=1e-4, atol=1e-6)


def test_the_demos_learning_rate_follows_a_cosine_per_epoch() -> None:
    step, batch, rates = DemoStep(TASK, CPU, steps_per_epoch=2), views(), []
    for _ in range(5):
        step(batch)
        rates.append(step.optimiser.param_groups[0]["lr"])
    expected = [TASK.lr * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2 for epoch in (0, 0, 1, 1, 2)]
    assert rates == pytest.approx(expected)
    assert rates[0] == TASK.lr


@pytest.mark.slow
@needs_lightly
def test_lightlys_key_encoder_is_averaged_and_its_bank_receives_the_keys() -> None:
    torch.manual_seed(0)
    step, batch = LightlyStep(TASK, CPU), views()
    step(batch)  # both encoders were equal, so the first average changes nothing
    before = [p.clone() for p in step.key.parameters()]
    query = [p.detach().clone() for p in step.query.parameters()]
    step(batch)
    m = TASK.ema_momentum
    for now, key, q in zip(step.key.parameters(), before, query, strict=True):
        torch.testing.assert_close(now, m * key + (1 - m) * q)
        assert not now.requires_grad
    bank = step._criterion.memory_bank
    assert int(bank.bank_ptr) == 2 * TASK.batch_size
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(TASK.queue))


def test_an_epoch_of_a_peer_has_every_image_once_and_the_next_has_another_order(images: ImageIndex) -> None:
    index = ImageIndex.from_pixels("numbers", np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3))
    dataset = LabelledImages(index, _number)
    torch.manual_seed(0)
    batches = endless_views(dataset, 5, CPU, Loading(workers=0))
    first, second = ([int(v) for _ in range(4) for v in next(batches).query.flatten()] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    seven = endless_views(dataset, 7, CPU, Loading(workers=0))
    assert len({int(v) for _ in range(2) for v in next(seven).key.flatten()}) == 14  # the last six are dropped


def _number(image: Any) -> list[Tensor]:
    return [torch.tensor([image.getpixel((0, 0))[0]])] * 2


def test_decoding_in_advance_changes_no_image(images: ImageIndex) -> None:
    from_files, in_memory = LabelledImages(images), LabelledImages(decoded(images))
    assert len(from_files) == len(in_memory) == 20
    for i in (0, 19):
        np.testing.assert_array_equal(np.asarray(from_files[i][0]), np.asarray(in_memory[i][0]))


@pytest.mark.parametrize("peer", ["authors", pytest.param("lightly", marks=[needs_lightly, pytest.mark.slow])])
def test_the_views_of_a_peer_are_two_normalised_crops_of_an_image(images: ImageIndex, peer: str) -> None:
    dataset = (lightly_dataset if peer == "lightly" else demo_dataset)(images, CIFAR, 16)
    torch.manual_seed(0)
    batch = next(endless_views(dataset, 8, CPU, Loading(workers=0)))
    darkest, brightest = -max(m / s for m, s in zip(CIFAR.mean, CIFAR.std, strict=True)), 2.8
    for view in (batch.query, batch.key):
        assert view.shape == (8, 3, 16, 16)
        assert darkest <= float(view.min()) < -0.5
        assert 0.5 < float(view.max()) <= brightest
    assert not torch.equal(batch.query, batch.key)


def test_the_defaults_are_those_of_the_authors_and_a_tuned_loader_pins_its_memory() -> None:
    assert (default_loading(32).workers, default_loading(224).workers) == (16, 32)
    assert default_loading(32).pinned
    assert tuned(3) == Loading(workers=3, prefetched=4, pinned=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (peers.Settings(rows="fastmoco-torch,simclr"), "--rows simclr is unknown"),
        (peers.Settings(rows=","), "--rows is empty"),
        (peers.Settings(data="shapes", limit=100, rows="authors", device="cpu"), "512 is more than the 100"),
        (peers.Settings(quick=True, batch_size=9, data="shapes", limit=50, device="cpu"), "cannot be split"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings: peers.Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        peers.main(settings, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("batch", "symmetric", "queue"), [(512, False, 4096), (96, False, 4032), (96, True, 4032), (160, True, 3840)]
)
def test_the_queue_is_a_multiple_of_the_keys_of_a_step(batch: int, symmetric: bool, queue: int) -> None:
    assert peers._task(peers.Settings(batch_size=batch, symmetric=symmetric)).queue == queue


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_listed_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lightly.transforms", None)
    file = io.StringIO()
    settings = peers.Settings(quick=True, data="shapes", limit=64, rows="fastmoco-resident,lightly", device="cpu")
    result = peers.main(settings, Console(file=file, width=150))
    assert list(result["rows"]) == ["fastmoco-resident"]
    assert "uv sync --inexact --group bench" in result["left_out"]["lightly"]
    assert "lightly" in file.getvalue()
    assert "uv sync --inexact --group bench" in file.getvalue()


@pytest.mark.slow
def test_the_script_measures_all_rows_and_their_ratios(images: ImageIndex, tmp_path: Path) -> None:
    """Started as in its documentation, with worker processes."""
    assert images.paths is not None
    folder = str(Path(images.paths[0]).parent)
    flags = ["--quick", "--device", "cpu", "--data", folder, "--out", str(tmp_path)]
    command, environment = (
        [sys.executable, "benchmarks/compare_peers.py", *flags],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "peers-cifar.json").read_text())
    rows, expected = result["rows"], {*peers.OURS, *peers.PEERS}
    if importlib.util.find_spec("lightly") is None:
        assert result["left_out"].keys() == {"lightly", "lightly-best"}
        expected -= result["left_out"].keys()
    else:
        assert result["left_out"] == {}
    assert rows.keys() == expected
    for name, row in rows.items():
        assert name in done.stdout
        assert row["terms"].split(",")[0] in ("fp32", "bf16")
        assert len(row["images_per_s"]["values"]) == 2
        assert row["images_per_s"]["median"] > 0
        assert 0 <= row["data_wait_percent"]["median"] <= 100
        assert row["host_bytes"]["median"] > 50e6  # two encoders of 45 MB
    for ours, peer in [(o, p) for o in peers.OURS for p in expected if p in peers.PEERS]:
        pairs = zip(rows[ours]["images_per_s"]["values"], rows[peer]["images_per_s"]["values"], strict=True)
        assert result["ratios"][ours][peer]["values"] == pytest.approx([a / b for a, b in pairs])
    tuning = rows["authors-best"]["tuning"]
    assert set(tuning) == {"1", "2"}  # one worker was set: half of it is one too
    fastest = max(tuning, key=lambda n: tuning[n])
    assert rows["authors-best"]["terms"].endswith(f" {fastest} worker" + ("" if fastest == "1" else "s"))
