"""Software, processor, memory and limits of this machine."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.units import bytes_text
from fastmoco.nvml import driver_version
from fastmoco.run.environment import git_commit
from pipelines import host_memory
from pipelines.cgroups import cpu_quota
from pipelines.platforms import affine_cpus, processor_name, usable_cpus

_PACKAGES = {
    "fastmoco": ("fastmoco",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    "numpy": ("numpy",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "ffcv": ("ffcv",),
}
_SIMD = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_LEAST_MEMORY = 4 * 2**30  # bytes: the shapes recipe on a CPU takes 2 GiB
_LEAST_SHARED = 2**30  # bytes: 8 workers × 4 batches of the baseline, 64 pairs of 224 px each, are 2.5 GB
_LEAST_FILES = 1024


def software(target: Target) -> Finding:
    """Versions; `failed` if torch cannot be imported."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "os": platform.platform()}
    for name, distributions in _PACKAGES.items():
        versions[name] = None
        for distribution in distributions:
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(distribution)
    versions["commit"] = git_commit()
    try:
        import torch
    except Exception as error:
        reason = " ".join(str(error).split())
        return Finding(
            status=Status.FAILED,
            text=f"torch cannot be imported ({type(error).__name__}: {reason[:200]})",
            figures=versions,
            advice="install it again: pip install --force-reinstall torch torchvision",
        )
    cudnn = torch.backends.cudnn.version()
    versions |= {"cuda": torch.version.cuda, "cudnn": str(cudnn) if cudnn else None, "driver": driver_version()}
    shown = [f"{name} {versions[name]}" for name in ("python", *_PACKAGES, "cuda", "driver") if versions.get(name)]
    return Finding(text=", ".join(shown), figures=versions)


def processor(target: Target) -> Finding:
    """Cores that this process may use, and the instructions that matter."""
    model, flags = processor_name(), _cpu_flags()
    affinity, usable, quota = affine_cpus(), usable_cpus(), cpu_quota()
    simd = [name for name in _SIMD if name in flags]
    text = f"{model}: {usable} of {os.cpu_count()} cores, {' '.join(simd) or platform.machine()}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows
    advice = ""
    if load > usable:
        advice = f"other programs use it (load {load:.1f}): the rates below are too low, and training would be slower"
    if quota < affinity:
        advice = f"the container's quota is {quota:g} of {affinity} cores: train, eval and the rates below use {usable}"
    figures: dict[str, Any] = {
        "model": model,
        "cores": os.cpu_count(),
        "affinity_cores": affinity,
        "quota_cores": None if math.isinf(quota) else quota,
        "usable_cores": usable,
        "simd": simd,
        "load": load,
    }
    return Finding(text=text, figures=figures, advice=advice)


def _cpu_flags() -> set[str]:
    """Flags of the processor, from /proc/cpuinfo."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return set(flags[1].split() if flags else ())


def memory(target: Target) -> Finding:
    """Memory of the machine, or of the container if that has less."""
    total = free = host_memory.on_host_bytes()
    with suppress(OSError):  # Linux
        total = host_memory.meminfo()["MemTotal"]
    tightest = min(host_memory.container_limits(), key=lambda group: group.left, default=None)
    limit = None if tightest is None else tightest.limit
    if tightest is not None and tightest.limit < total:
        total, free = tightest.limit, min(free, tightest.left)
    advice = ""
    if free < _LEAST_MEMORY:
        advice = "little is free: end other programs, or use a smaller --batch-size"
    figures = {"total_bytes": total, "free_bytes": free, "limit_bytes": limit}
    of_what = "container" if limit == total else "machine"
    text = f"{bytes_text(free)} free of the {of_what}'s {bytes_text(total)}"
    return Finding(text=text, figures=figures, advice=advice)


def shared_memory(target: Target) -> Finding:
    """/dev/shm, in which the workers of a DataLoader pass tensors."""
    if platform.system() != "Linux":
        return Finding(status=Status.SKIPPED, text="only on Linux")
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return Finding(
            status=Status.MISSING,
            text="there is no /dev/shm",
            advice="--pipeline dataloader passes batches through it: use another pipeline",
        )
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    advice = ""
    if free < _LEAST_SHARED:
        advice = (
            "--pipeline dataloader and NCCL need more for large batches: docker run --shm-size=8g (other pipelines do "
            "not use it)"
        )
    figures = {"total_bytes": total, "free_bytes": free}
    return Finding(text=f"{bytes_text(free)} free of {bytes_text(total)} in /dev/shm", figures=figures, advice=advice)


def open_files(target: Target) -> Finding:
    """Limit on open files: each worker and each batch in flight takes some."""
    try:
        import resource
    except ImportError:  # Windows
        return Finding(status=Status.SKIPPED, text="not limited on Windows")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "" if soft >= _LEAST_FILES or soft < 0 else f"too few for many workers: ulimit -n {min(hard, 65_536)}"
    figures = {"soft": soft, "hard": hard}
    return Finding(text=f"up to {soft:,} (hard limit {hard:,})", figures=figures, advice=advice)
