"""Communication between processes: gloo on the host, NCCL between the GPUs of this machine."""

from __future__ import annotations

import multiprocessing

import torch

from fastmoco.distributed.probe import is_available, try_all_reduce
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.units import bytes_text, si

_SIZE = {"gloo": 2**22, "nccl": 2**26}  # bytes; the gradients of ResNet-50 are 112 MB
_MOST_RANKS = 8


def gloo(target: Target) -> Finding:
    """Two processes, as --gpus 2 and torchrun start them on a CPU; on GPUs it carries votes and errors."""
    return _try("gloo", 2, "several processes: check that this host's name resolves, or set GLOO_SOCKET_IFNAME=lo")


def nccl(target: Target) -> Finding:
    """One process for each visible GPU, at most 8."""
    if torch.device(target.device).type != "cuda":
        return Finding(status=Status.SKIPPED, text="needs a GPU")
    brings = "training on several GPUs: run again with NCCL_DEBUG=INFO, and see nvidia-smi topo -m"
    return _try("nccl", min(_MOST_RANKS, target.gpus), brings)


def _try(backend: str, ranks: int, brings: str) -> Finding:
    if "fork" not in multiprocessing.get_all_start_methods():
        return Finding(status=Status.SKIPPED, text="not tried on Windows")
    if not is_available(backend):
        return Finding(
            status=Status.MISSING,
            text=f"torch is built without {backend}",
            advice="training on several devices: pip install torch from pytorch.org",
        )
    size = _SIZE[backend]
    try:
        seconds = try_all_reduce(backend, ranks, size)
    except RuntimeError as error:
        return Finding(status=Status.FAILED, text=str(error), figures={"ranks": ranks}, advice=f"needed for {brings}")
    bus = 2 * (ranks - 1) / ranks * size / seconds  # what each link carries, as in nccl-tests
    figures = {"ranks": ranks, "size_bytes": size, "seconds": seconds, "bus_bytes_per_s": bus}
    rate = f", {si(bus, 'B/s')} of bus bandwidth" if ranks > 1 else ""
    processes = f"{ranks} processes" if ranks > 1 else "one process"
    return Finding(text=f"{processes} sum {bytes_text(size)} in {si(seconds, 's')}{rate}", figures=figures)
