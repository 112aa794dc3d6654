"""Compiling a C file at first use: where it is kept, when it is compiled again, and every way in which it fails."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from pipelines import c_library
from pipelines.c_library import COMPILERS, NoLibraryError, load

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler is installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, not made yet."""
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def accept(library: ctypes.CDLL) -> None:
    """Any result is right."""


def reject(library: ctypes.CDLL) -> None:
    raise NoLibraryError("the answer is wrong")


def compilers_are(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str | None) -> None:
    """From now on `cc` is a shell script, and there is no other compiler."""
    path = folder / "bin"
    path.mkdir(exist_ok=True)
    if script is not None:
        (path / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (path / "cc").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(path / name) if (path / name).exists() else None)


def reason(source: Path) -> str:
    with pytest.raises(NoLibraryError) as caught:
        load(source, accept)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- with a compiler -------------------------------------------------------------------------------------------------


@needs_compiler
def test_compiled_once_and_used_without_a_compiler(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(source, accept).answer() == 42
    library, digest = kept(folder)
    assert library.startswith("answer-")
    assert digest == f"{library}.sha256"
    compilers_are(monkeypatch, tmp_path, None)
    assert load(source, accept).answer() == 42


@needs_compiler
def test_changed_source_is_compiled_anew(source: Path, folder: Path) -> None:
    load(source, accept)
    source.write_text("int answer(void) { return 43; }\n")
    assert load(source, accept).answer() == 43
    assert len(kept(folder)) == 4


@needs_compiler
def test_a_library_for_another_processor_is_not_loaded(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was copied, or that machines share."""
    load(source, accept)
    other = "DEFAULT" if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else "AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: other)
    compilers_are(monkeypatch, tmp_path, None)
    assert "no C compiler" in reason(source)


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "cut off", "one bit"])
def test_a_damaged_library_is_compiled_anew(source: Path, folder: Path, damage: bytes | None) -> None:
    load(source, accept)
    path = folder / kept(folder)[0]
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.unlink()  # it is mapped into this process
    path.write_bytes(damaged if damage is None else damage)
    assert load(source, accept).answer() == 42
    assert path.read_bytes() != damage
    assert len(kept(folder)) == 2


@needs_compiler
def test_wrong_results_are_not_used_and_not_kept(source: Path, folder: Path) -> None:
    with pytest.raises(NoLibraryError, match="the answer is wrong"):
        load(source, reject)
    assert kept(folder) == []


@needs_compiler
def test_many_at_the_same_time(source: Path, folder: Path) -> None:
    """Each finds a library, and nothing is left over."""
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(load(source, accept).answer())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 4
    assert len(kept(folder)) == 2


@needs_compiler
def test_a_mistake_in_the_source_is_quoted(source: Path, folder: Path) -> None:
    source.write_text("int answer(void) { return unknown; }\n")
    assert "error" in reason(source)
    assert "unknown" in reason(source)
    assert kept(folder) == []


# ---- without one that works ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, "no C compiler was found (cc, gcc, clang)"),
        ("echo 'a.c:1:10: fatal error: math.h: No such file' >&2; echo stopped. >&2; exit 1", "math.h: No such file"),
        ("echo 'ld: final link failed: No space left on device' >&2; exit 1", "No space left on device"),
        ("exit 3", "failed: exit code 3"),
        ("exit 0", "cannot be loaded"),
        ('while [ "$1" != -o ]; do shift; done; echo text > "$2"', "cannot be loaded"),
        ("kill -9 $$", "failed: exit code -9"),
    ],
    ids=["none", "no headers", "disk full", "silent", "writes nothing", "writes text", "killed"],
)
def test_the_reason_is_given_and_nothing_is_kept(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: str
) -> None:
    compilers_are(monkeypatch, tmp_path, script)
    assert expected in reason(source)
    assert not folder.exists() or kept(folder) == []


def test_a_compiler_that_hangs_is_ended(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers_are(monkeypatch, tmp_path, "exec sleep 60")
    monkeypatch.setattr(c_library, "LIMIT_S", 0.1)
    assert "took longer than" in reason(source)
    assert kept(folder) == []


def test_a_compiler_that_cannot_be_started(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers_are(monkeypatch, tmp_path, "exit 0")
    (tmp_path / "bin" / "cc").write_text("#!/no/such/shell\n")
    assert "cannot be used" in reason(source)


def test_a_folder_that_cannot_be_made(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "file" / "cache"))
    compilers_are(monkeypatch, tmp_path, "exit 0")
    assert str(tmp_path / "file") in reason(source)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: object, *arguments: object) -> int:
        raise OSError(code, os.strerror(code), str(path))

    folder.mkdir()
    compilers_are(monkeypatch, tmp_path, "exit 0")
    monkeypatch.setattr("pipelines.files.os.open", refuse)
    line = reason(source)
    assert os.strerror(code) in line
    assert str(folder) in line


def test_a_user_without_a_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTMOCO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    compilers_are(monkeypatch, tmp_path, "exit 0")
    assert "home directory" in reason(source)
