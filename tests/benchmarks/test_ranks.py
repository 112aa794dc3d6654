"""Scaling over ranks: traffic, efficiency, failures of ranks, and the model for many GPUs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import expected_efficiency
from benchmarks.expected_efficiency import Links, Settings, expected
from benchmarks.measure.plain import Task
from benchmarks.measure.rank_scaling import HALF_GRADIENTS, Messages, Ranks, add_efficiency, loopback_bytes
from benchmarks.measure.variants import CONFIGS, train_step
from benchmarks.reporting import sections
from benchmarks.reporting.page import Table
from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError, RankLostError
from fastmoco.step.gradients import BUCKET_BYTES

ROOT = Path(__file__).resolve().parents[2]
TASK = replace(CONFIGS["cifar"], side=16, batch_size=8, queue=64, bn_splits=2)
CLOSE = 1.05
HEADERS = 200_000.0  # bytes of overhead
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


def two_ranks(**options: Any) -> Ranks:
    return Ranks(2, TASK, torch.float32, "cpu", seconds=0.1, **options)


@pytest.mark.slow
@needs_two_cores
def test_two_ranks_send_the_lower_bound_and_efficiency_is_the_ratio_of_their_rates(tmp_path: Path) -> None:
    """Started as in its documentation, with the axis as in the report; what other tests send must not be counted."""
    private = [sys.executable, "-m", "tests.private_network"]
    if subprocess.run([*private, shutil.which("true") or "true"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("counting the bytes of this command alone needs a network namespace, which is not permitted here")
    flags = ["--quick", "--device", "cpu", "--axis", "ranks", "--out", str(tmp_path)]
    done = subprocess.run(
        [*private, sys.executable, "benchmarks/scaling.py", *flags],
        cwd=ROOT,
        # Where no name service can be reached, torch warns that the client has no host name.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    result = json.loads((tmp_path / "scaling-cifar.json").read_text())
    axis = result["axes"]["ranks"]
    rows = {(row["case"], row["point"]): row for row in axis["rows"]}
    assert list(rows) == [(case, ranks) for ranks in (1, 2) for case in HALF_GRADIENTS]
    for (case, ranks), row in rows.items():
        alone = rows[case, 1]
        for value, rate, first, step_ms in zip(
            *(one["values"] for one in (row["efficiency"], row["images_per_s"], alone["images_per_s"], row["step_ms"])),
            strict=True,
        ):
            assert rate == pytest.approx(8 * ranks / step_ms * 1e3)
            assert value == pytest.approx(rate / first / ranks)
        sent, least = row["sent_bytes"]["median"], row["least_bytes"]["median"]
        assert least <= sent <= CLOSE * least + HEADERS
    fp32, bf16 = (rows[case, 2]["least_bytes"]["median"] for case in HALF_GRADIENTS)
    parameters = 11_168_832 + 512 * 128 + 128  # of the encoder with the head, without padding
    assert fp32 == pytest.approx(4 * parameters, rel=0.01)
    assert bf16 == pytest.approx(2 * parameters, rel=0.01)
    assert "efficiency" in done.stdout
    (shown,) = [block for block in sections._scaling("scaling", result) if isinstance(block, Table)]
    assert shown.columns[-2:] == ("efficiency", "MB sent (lower bound)")
    assert re.fullmatch(r"45\.\d\d \(45\.\d\d\)", shown.rows[2][-1])


def test_the_messages_are_those_in_the_documentation() -> None:
    """docs/scale-out.md, "What is sent"."""
    task = CONFIGS["r50"]
    step = train_step(task, World(torch.device("meta")), torch.bfloat16)
    messages = Messages.of(step, task, half=False)
    assert messages.gradients == pytest.approx(95e6, rel=0.01)
    assert messages.statistics == pytest.approx(425e3, rel=0.01)
    assert messages.keys == 128 * 1024
    assert Messages.of(step, task, half=True).gradients * 2 == messages.gradients
    assert Messages(8, 4, 12).least_bytes(1) == 0
    assert Messages(8, 4, 12).least_bytes(4) == (2 * 8 + 2 * 4 + 12) * 3 / 4


def test_efficiency_is_relative_to_one_rank_in_the_same_round() -> None:
    rates = {1: (10.0, 5.0), 4: (20.0, 18.0)}
    readings = {("a", ranks): [{"images_per_s": rate} for rate in of_ranks] for ranks, of_ranks in rates.items()}
    add_efficiency(readings)
    assert [reading["efficiency"] for reading in readings["a", 4]] == [0.5, 0.9]
    assert [reading["efficiency"] for reading in readings["a", 1]] == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, "rank 1 of 2 was killed by SIGKILL"), (signal.SIGSTOP, "rank [01] of 2 has (not|lost)")],
)
def test_a_rank_that_dies_or_stalls_ends_the_measurement_in_time(number: signal.Signals, message: str) -> None:
    began = math.inf
    with pytest.raises(RankLostError, match=message) as raised, two_ranks() as ranks:  # noqa: PT012 - while it is open
        ranks._timeout_s = 5.0
        os.kill(ranks.processes[1].pid, number)
        began = time.monotonic()
        ranks.read("fp32 gradients")
    assert time.monotonic() - began < 20
    assert "\n" not in str(raised.value)
    assert not any(process.is_alive() for process in ranks.processes)


@pytest.mark.slow
def test_a_rank_that_fails_reports_its_error() -> None:
    broken = replace(TASK, arch="resnet1")
    with pytest.raises(ConfigError, match="unknown architecture 'resnet1'"):
        Ranks(2, broken, torch.float32, "cpu", seconds=0.1)


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="the loopback device is lo on Linux only")
def test_loopback_traffic_is_counted() -> None:
    before = loopback_bytes()
    assert before is not None
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            client.sendall(bytes(100_000))
            remaining = 100_000
            while remaining:
                remaining -= len(peer.recv(remaining))
    after = loopback_bytes()
    assert after is not None
    assert after - before >= 100_000


def test_the_documentation_has_the_output_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    page = expected_efficiency.main(Settings())
    assert capsys.readouterr().out == page + "\n"
    assert page in (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")


LINKS = Links(gpus_per_machine=8, nvlink=100e9, network=10e9)


def test_a_message_takes_its_bytes_over_the_bandwidth_and_its_hops() -> None:
    """800 MB on 8 GPUs: 2 · 7/8 of it through NVLink, after 8.4 µs and 14 hops of 3.4 µs (tree: 14 of 4)."""
    assert LINKS.all_reduce_s(800e6, 8) == pytest.approx(1400e6 / 100e9 + 56e-6)
    assert LINKS.gather_s(800e6, 8) == pytest.approx(700e6 / 100e9 + 32.2e-6)
    # Four machines share out 80 GB/s; the tree has 14 hops inside and 4 outside, the ring 56 and 6.
    assert LINKS.all_reduce_s(800e6, 32) == pytest.approx(1550e6 / 80e9 + (8.4 + 14 * 4 + 4 * 14) * 1e-6)
    assert LINKS.gather_s(800e6, 32) == pytest.approx(775e6 / 80e9 + (8.4 + 28 * 3.4 + 3 * 14) * 1e-6)
    # An empty message takes the start and the hops of the fastest protocol.
    assert LINKS.all_reduce_s(0, 32) == pytest.approx((6.8 + 14 * 0.6 + 4 * 5) * 1e-6)


def rows_of(images_per_s: float, links: Links, gpus: int) -> list[expected_efficiency.Expected]:
    task: Task = CONFIGS["cifar"]
    return list(expected("cifar", task, task.batch_size / images_per_s, links, [gpus]))


def test_only_the_last_bucket_is_exposed_if_the_backward_is_longer_than_the_messages() -> None:
    fp32, bf16 = rows_of(1000.0, LINKS, 64)
    assert fp32.exposed_s == LINKS.all_reduce_s(BUCKET_BYTES, 64)
    assert bf16.exposed_s == LINKS.all_reduce_s(BUCKET_BYTES // 2, 64)
    assert fp32.efficiency == fp32.step_s / (fp32.step_s + fp32.exposed_s)
    assert fp32.synchronised_efficiency < fp32.efficiency < bf16.efficiency < 1


@pytest.mark.parametrize("share", [1.1, 0.9])
def test_more_than_the_last_bucket_is_exposed_below_the_minimum_bandwidth(share: float) -> None:
    floor = rows_of(1000.0, LINKS, 64)[0].floor_bytes_per_s
    links = replace(LINKS, network=share * floor / 8, latency_factor=1e-9)
    row, last_s = rows_of(1000.0, links, 64)[0], links.all_reduce_s(BUCKET_BYTES, 64)
    assert (row.exposed_s > 1.01 * last_s) == (share < 1)
    assert row.exposed_s >= last_s


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(gpus="8,12"), "--gpus 8,12 with 8 in a machine"),
        (Settings(gpus="8,many"), "--gpus 8,many"),
        (Settings(network_gb_per_s=0), "--network-gb-per-s is 0"),
        (Settings(images_per_s=100.0), "add --config r50 or cifar"),
        (Settings(config="r50", images_per_s=-1.0), "expected more than 0"),
    ],
)
def test_invalid_settings_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expected_efficiency.main(settings)
