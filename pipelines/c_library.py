"""Compiles a C file of this package when it is first used, and keeps the library for later runs.

A library is kept in the user's cache, under a name that depends on the source, the compiler's options, which include
the vector instructions of this processor, and the platform: one from elsewhere, or of other code, is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.files import cache_folder, recorded_digests, replacing, sha256, sidecar, write_atomically

COMPILERS = ("cc", "gcc", "clang")
LIMIT_S = 60.0  # for a compiler, which takes a second
# None of these changes the value of a finite result: the last ones turn comparisons into vector minima and maxima.
_OPTIONS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_OPTIONS += ["-fno-signed-zeros", "-ffinite-math-only"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_REASON_CHARACTERS = 160

Check = Callable[[ctypes.CDLL], None]


class NoLibraryError(Exception):
    """There is no library to use, and why, in one line."""


def load(source: Path, check: Check) -> ctypes.CDLL:
    """The library of a C file, kept from an earlier run or compiled now.

    check  called with a library before it is used or kept; raises NoLibraryError if its results are wrong

    Several processes may do this at the same time. Raises NoLibraryError.
    """
    try:
        path = _path(source)
        return _kept(path, check) or _compiled(source, path, check)
    except OSError as error:
        where = f"{error.filename} " if error.filename else ""
        raise NoLibraryError(f"{where}cannot be used: {error.strerror or error}") from error


def _path(source: Path) -> Path:
    """Where the library of a C file is kept. Raises OSError."""
    target = (*_options(), platform.machine(), sysconfig.get_config_var("SOABI"), *platform.libc_ver())
    key = hashlib.sha256(source.read_bytes() + repr(target).encode()).hexdigest()
    return cache_folder() / f"{source.stem}-{key[:16]}.so"


def _options() -> list[str]:
    """Options for the vector instructions that torch found on this processor, and no others."""
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = _AVX512 if capability.startswith("AVX512") else _AVX2 if capability.startswith("AVX") else []
    return [*_OPTIONS, *vectors]


def _kept(path: Path, check: Check) -> ctypes.CDLL | None:
    """The library in the cache; None if it is missing, damaged, or does not work."""
    try:
        if sha256(path) not in recorded_digests(path):
            return None
        library = ctypes.CDLL(str(path))
        check(library)
    except (OSError, NoLibraryError):
        return None
    return library


def _compiled(source: Path, path: Path, check: Check) -> ctypes.CDLL:
    """Raises NoLibraryError, and OSError if the library cannot be written."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoLibraryError(f"no C compiler was found ({', '.join(COMPILERS)})")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as part:
        _run([compiler, *_options(), str(source), "-o", str(part), "-lm"])
        try:
            library = ctypes.CDLL(str(part))
        except OSError as error:  # its message names the file, but not as an attribute
            raise NoLibraryError(f"what {compiler} made cannot be loaded: {error}") from error
        check(library)
        digest = sha256(part)
    write_atomically(sidecar(path), f"{digest}  {path.name}\n", shared=True)
    return library


def _run(command: list[str]) -> None:
    """Raises NoLibraryError with what the compiler said, and OSError if it cannot be started."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, env=environment
        )
    except subprocess.TimeoutExpired:
        raise NoLibraryError(f"{command[0]} took longer than {LIMIT_S:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[-1])
        raise NoLibraryError(f"{command[0]} failed: {line.strip()[:_REASON_CHARACTERS]}")
