"""Expected efficiency on 8, 64 and 512 GPUs: a model of a step's time, messages and links, not a measurement.

    uv run python benchmarks/expected_efficiency.py
    uv run python benchmarks/expected_efficiency.py --config r50 --images-per-s 5600 --network-gb-per-s 11

Every GPU has the same number of images per step (weak scaling). A step that takes T on one GPU is assumed to be a
quarter keys, a quarter queries and half backward, in proportion to the arithmetic. On R GPUs it takes T plus the
communication that is not hidden: that of the keys beyond the queries, that of statistics and gradients beyond the
backward, and the last bucket of gradients, which is complete only after the backward. Messages of synchronised batch
norm (--bn-splits 1) are never hidden.

A message of n bytes between R GPUs in M machines takes the time of the fastest of NCCL's protocols:

    all-reduce   ring   start + 2(R − M) NVLink hops + 2(M − 1) network hops            + 2n(R − 1)/R / bandwidth
                 tree   start + 2(R/M − 1) NVLink hops + 2 log2(M) network hops         + the same
    all-gather   ring   start + (R − M) NVLink hops + (M − 1) network hops              + n(R − 1)/R / bandwidth

with n the total for the gather. Bytes and rings are those of Thakur, Rabenseifner and Gropp 2005 and Patarasuk and
Yuan 2009, who prove them minimal; trees, protocols and latencies those of NCCL's tuning model (src/graph/tuning.cc).
Rings leave a machine through the links of all its GPUs, so bandwidth is the smaller of a GPU's NVLink and of those
links together. Not modelled: multiprocessors that NCCL takes from the step, waiting for a slow rank, NVLink SHARP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro

from benchmarks.measure.harness import run_script
from benchmarks.measure.plain import Task
from benchmarks.measure.rank_scaling import HALF_GRADIENTS, Messages
from benchmarks.measure.variants import CONFIGS, train_step
from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.step.gradients import BUCKET_BYTES

TARGET_RATES = {"r50": 5000.0, "cifar": 50000.0}  # images/s of one H200
IMAGES = {"r50": 1_281_167, "cifar": 50_000}  # per epoch: ImageNet-1k, CIFAR-10
QUERIES, BACKWARD = 1 / 4, 1 / 2  # shares of a step
MIN_EFFICIENCY, MIN_QUEUE_STEPS = 0.9, 8  # below these, a limit is reported
_FLOAT = 4


@dataclass(frozen=True)
class Protocol:
    """Latencies of a NCCL protocol in µs, of the start, a NVLink hop and a network hop, and its share of bandwidth."""

    ring_us: tuple[float, float, float]
    tree_us: tuple[float, float, float]
    share: float


PROTOCOLS = (  # of NCCL 2.2x on Hopper. The share of LL is that between machines
    Protocol((6.6, 0.6, 2.7), (6.8, 0.6, 5.0), 0.1),  # LL
    Protocol((14.0, 1.9, 4.0), (14.0, 1.25, 8.5), 0.92),  # LL128
    Protocol((8.4, 3.4, 14.0), (8.4, 4.0, 14.0), 1.0),  # Simple
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Expected efficiency on many GPUs, from the rate of one GPU and the links between them."""

    config: Literal["r50", "cifar"] | None = None
    """ResNet-50 at 224 px, or ResNet-18 at 32 px. Unset: both, at the target rates on an H200."""
    images_per_s: float | None = None
    """With --config: the rate of one GPU."""
    batch_size: int | None = None
    """With --config: images per step on each GPU."""
    gpus: str = "8,64,512"
    """Numbers of GPUs, separated by commas."""
    gpus_per_machine: int = 8
    """GPUs connected by NVLink, each with its share of the network links."""
    nvlink_gb_per_s: float = 370.0
    """NCCL's rate through a GPU's NVLink in one direction: on H100 and H200 370 of the link's 450."""
    network_gb_per_s: float = 45.0
    """The same for a GPU's share of the network: nine tenths of one 400 Gb/s InfiniBand port."""
    latency_factor: float = 1.0
    """Factor on the latencies of NCCL's tuning model."""
    quick: bool = False
    """Only ResNet-18 on 8 GPUs."""


@dataclass(frozen=True)
class Links:
    """Links between GPUs, in bytes/s per GPU."""

    gpus_per_machine: int
    nvlink: float
    network: float
    latency_factor: float = 1.0

    def all_reduce_s(self, count: float, gpus: int) -> float:
        """Seconds to all-reduce `count` bytes on every GPU."""
        machines = self._machines(gpus)
        ring, tree = 2 * (gpus - machines), 2 * (gpus / machines - 1)
        moved = 2 * count * (gpus - 1) / gpus
        by_ring = self._fastest(lambda p: p.ring_us, ring, 2 * (machines - 1), moved, gpus)
        by_tree = self._fastest(lambda p: p.tree_us, tree, 2 * math.log2(machines), moved, gpus)
        return min(by_ring, by_tree)

    def gather_s(self, count: float, gpus: int) -> float:
        """Seconds to gather `count` bytes in total."""
        machines, moved = self._machines(gpus), count * (gpus - 1) / gpus
        return self._fastest(lambda p: p.ring_us, gpus - machines, machines - 1, moved, gpus)

    def _machines(self, gpus: int) -> int:
        return max(1, gpus // self.gpus_per_machine)

    def _fastest(
        self,
        latencies_us: Callable[[Protocol], Sequence[float]],
        nvlink_hops: float,
        network_hops: float,
        moved: float,
        gpus: int,
    ) -> float:
        bandwidth = self.nvlink
        if gpus > self.gpus_per_machine:
            bandwidth = min(bandwidth, self.gpus_per_machine * self.network)
        times = []
        for protocol in PROTOCOLS:
            start, nvlink_hop, network_hop = latencies_us(protocol)
            latency = (start + nvlink_hops * nvlink_hop + network_hops * network_hop) * self.latency_factor * 1e-6
            times.append(latency + moved / (protocol.share * bandwidth))
        return min(times)


@dataclass(frozen=True)
class Expected:
    """A row: messages of a step on a number of GPUs, their durations, and the time that is not hidden.

    floor_bytes_per_s  the bandwidth below which the backward does not hide all buckets but the last
    """

    name: str
    case: str
    gpus: int
    batch: int
    queue_steps: float
    epoch_steps: float
    step_s: float
    sent_bytes: float
    gradients_s: float
    keys_s: float
    exposed_s: float
    synchronised_s: float
    floor_bytes_per_s: float

    @property
    def efficiency(self) -> float:
        return self.step_s / (self.step_s + self.exposed_s)

    @property
    def synchronised_efficiency(self) -> float:
        """With one batch norm group over all GPUs."""
        return self.step_s / (self.step_s + self.exposed_s + self.synchronised_s)


def main(settings: Settings) -> str:
    """Print and return a Markdown table and the limits in the order of their appearance. Raises ConfigError."""
    if settings.quick:
        settings = replace(settings, config="cifar", gpus="8", images_per_s=None)
    counts, links = _counts(settings), _links(settings)
    names = ("r50", "cifar") if settings.config is None else (settings.config,)
    rows, limits, rates = [], [], []
    for name in names:
        task, images_per_s = _start(name, settings)
        of_task = list(expected(name, task, task.batch_size / images_per_s, links, counts))
        rows += of_task
        limits += describe_limits(of_task, task)
        rates.append(f"{images_per_s:,.0f} images/s of {of_task[0].name}")
    bandwidths = f"{settings.nvlink_gb_per_s:g} GB/s by NVLink and {settings.network_gb_per_s:g} by the network"
    given = f"Worked out, not measured, from {' and '.join(rates)} on one GPU, {bandwidths} for each:"
    page = "\n".join([given, "", *table(rows), "", "What breaks, first to last:", "", *limits])
    print(page)
    return page


def _counts(settings: Settings) -> list[int]:
    counts = [int(count) if count.strip().isdecimal() else 0 for count in settings.gpus.split(",")]
    per_machine = settings.gpus_per_machine
    for count in counts:
        if per_machine < 1 or count < 2 or (count > per_machine and count % per_machine):
            raise ConfigError(
                f"--gpus {settings.gpus} with {per_machine} in a machine: expected numbers of 2 or more that fill "
                "whole machines"
            )
    return counts


def _links(settings: Settings) -> Links:
    for name in ("nvlink_gb_per_s", "network_gb_per_s", "latency_factor"):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(settings, name)}: expected more than 0")
    nvlink, network = 1e9 * settings.nvlink_gb_per_s, 1e9 * settings.network_gb_per_s
    return Links(settings.gpus_per_machine, nvlink, network, settings.latency_factor)


def _start(name: str, settings: Settings) -> tuple[Task, float]:
    """The task of one GPU and its images/s."""
    given = (settings.images_per_s, settings.batch_size)
    if settings.config is None and given != (None, None):
        raise ConfigError("--images-per-s and --batch-size apply to one configuration: add --config r50 or cifar")
    if any(value is not None and value <= 0 for value in given):
        raise ConfigError("--images-per-s and --batch-size: expected more than 0")
    task = CONFIGS[name]
    return replace(task, batch_size=settings.batch_size or task.batch_size), settings.images_per_s or TARGET_RATES[name]


def expected(name: str, task: Task, step_s: float, links: Links, counts: Sequence[int]) -> Iterator[Expected]:
    """One row per gradient dtype and number of GPUs, from the messages of a step on the meta device."""
    step = train_step(task, World(torch.device("meta")), torch.bfloat16)
    channels = [layer.num_features for layer in step.model.query.modules() if isinstance(layer, SplitBatchNorm2d)]
    for case, half in HALF_GRADIENTS.items():
        for gpus in counts:
            batch = gpus * task.batch_size
            messages = Messages.of(step, replace(task, batch_size=batch), half=half)
            last = min(BUCKET_BYTES // (2 if half else 1), messages.gradients)
            buckets = math.ceil(messages.gradients / last)
            last_s = links.all_reduce_s(last, gpus)
            others_s = (buckets - 1) * links.all_reduce_s((messages.gradients - last) / max(1, buckets - 1), gpus)
            gradients_s = others_s + links.all_reduce_s(messages.statistics, gpus)
            keys_s = links.gather_s(messages.keys, gpus)
            hideable = 2 * (messages.gradients - last + messages.statistics) * (gpus - 1) / gpus
            yield Expected(
                name=f"{task.arch}, {task.side} px",
                case=case,
                gpus=gpus,
                batch=batch,
                queue_steps=task.queue / batch,
                epoch_steps=IMAGES[name] / batch,
                step_s=step_s,
                sent_bytes=messages.least_bytes(gpus),
                gradients_s=gradients_s + last_s,
                keys_s=keys_s,
                exposed_s=last_s + max(0.0, gradients_s - BACKWARD * step_s) + max(0.0, keys_s - QUERIES * step_s),
                synchronised_s=sum(
                    2 * links.gather_s(2 * _FLOAT * count * gpus, gpus) + links.all_reduce_s(2 * _FLOAT * count, gpus)
                    for count in channels
                ),
                floor_bytes_per_s=hideable / (BACKWARD * step_s),
            )


def table(rows: Sequence[Expected]) -> list[str]:
    """Markdown table: milliseconds of the messages, of the computation that hides them, and of the rest."""
    columns = ("step", "messages", "GPUs", "batch", "MB sent", "gradients / backward, ms", "keys / queries, ms")
    columns += ("left over, ms", "efficiency", "with synchronised BN")
    lines = [f"| {' | '.join(columns)} |", f"|---|---{'|---:' * (len(columns) - 2)}|"]
    for row in rows:
        ms = 1e3 * row.step_s
        cells = (
            row.name,
            row.case,
            str(row.gpus),
            f"{row.batch:,}",
            f"{row.sent_bytes / 1e6:.0f}",
            f"{1e3 * row.gradients_s:.2f} / {BACKWARD * ms:.1f}",
            f"{1e3 * row.keys_s:.2f} / {QUERIES * ms:.1f}",
            f"{1e3 * row.exposed_s:.2f}",
            f"{row.efficiency:.3f}",
            f"{row.synchronised_efficiency:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_limits(rows: Sequence[Expected], task: Task) -> list[str]:
    """Limits of one task with increasing numbers of GPUs, and the minimum bandwidth."""
    limits: list[tuple[int, str]] = []
    if short_queue := [row for row in rows if row.queue_steps < MIN_QUEUE_STEPS]:
        row = min(short_queue, key=lambda row: row.gpus)
        keys = f"{task.queue:,} keys last {row.queue_steps:,.1f} steps, an epoch has {row.epoch_steps:,.1f}"
        limits.append((row.gpus, f"the whole batch of {row.batch:,}: {keys}"))
    if slow := [row for row in rows if row.synchronised_efficiency < MIN_EFFICIENCY <= row.efficiency]:
        row = min(slow, key=lambda row: row.gpus)
        exposed = f"{1e3 * row.synchronised_s:.1f} ms that nothing hides, in a step of {1e3 * row.step_s:.1f}"
        limits.append((row.gpus, f"synchronised batch norm: {exposed}"))
    if slow := [row for row in rows if row.efficiency < MIN_EFFICIENCY]:
        row = min(slow, key=lambda row: row.gpus)
        limits.append((row.gpus, f"the messages, of which {1e3 * row.exposed_s:.1f} ms are left over"))
    lines = [f"- {rows[0].name}, on {gpus} GPUs: {limit}." for gpus, limit in sorted(limits, key=lambda pair: pair[0])]
    floors = {row.case: f"{row.floor_bytes_per_s / 1e9:.1f} GB/s for {row.case}" for row in rows}
    minimum = f"with a bandwidth below {', '.join(floors.values())}"
    lines.append(f"- {rows[0].name}, {minimum}: the backward no longer hides them.")
    return lines


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
