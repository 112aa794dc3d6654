"""Compiles the stand-in CUDA runtime with the C compiler at hand, once for each version of its sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
LIBRARIES = {
    "libcudart.so": ("log.c", "streams.c", "memory.c", "device.c", "kernels.c"),
    "libcuda.so.1": ("driver.c",),
}
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread")


class UnavailableError(Exception):
    """The stand-in cannot be built or loaded here; the text says why."""


def build() -> Path:
    """The folder with both libraries. Raises UnavailableError without a CUDA 13 build of torch, headers or compiler."""
    version = _cuda_of_torch()
    if version is None or not version.startswith("13."):
        raise UnavailableError(f"the stand-in replaces the runtime of CUDA 13, and torch is built for {version}")
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise UnavailableError(f"there is no C compiler: {', '.join(COMPILERS)}")
    headers = _cuda_headers()
    folder = _cache() / _digest(compiler, headers)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _compile(compiler, headers, temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _cuda_of_torch() -> str | None:
    """`torch.version.cuda`, without the seconds that importing torch takes."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]


def _cuda_headers() -> Path:
    """The headers of the wheel nvidia-cuda-runtime, which torch installs."""
    found = importlib.util.find_spec("nvidia")
    parents = found.submodule_search_locations if found else None
    for parent in parents or ():
        for header in sorted(Path(parent).glob("cu13*/include/driver_types.h")):
            return header.parent
    raise UnavailableError("the headers of CUDA 13 are not installed: pip install nvidia-cuda-runtime")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoco" / "standin"


def _digest(compiler: str, headers: Path) -> str:
    """Of all that the libraries are made from."""
    digest = hashlib.sha256("\0".join((compiler, *FLAGS)).encode())
    for path in (*sorted(NATIVE.iterdir()), headers / "driver_types.h", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, headers: Path, folder: Path) -> None:
    (folder / "crt").mkdir()
    shutil.copy(NATIVE / "host_defines.h", folder / "crt")
    for library, sources in LIBRARIES.items():
        command = [compiler, *FLAGS, f"-I{folder}", f"-I{headers}", "-o", str(folder / library)]
        done = subprocess.run([*command, *sources], cwd=NATIVE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"{compiler} failed: {done.stderr[-2000:]}")
