"""Checkpoints are loaded bit-identically as saved, and corrupt or foreign files are never loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmoco.errors import CheckpointError
from fastmoco.run.checkpoint import load, newest, prune, save, sweep, verify
from pipelines.files import sha256, sidecar


def tensors_of(step: int) -> dict[str, Tensor]:
    """One tensor of each kind that a training state has, different at every step."""
    flat = torch.arange(24, dtype=torch.float32) + step
    return {
        "weight": flat[4:16].view(3, 4),
        "same storage": flat[16:],
        "channels last": torch.full((2, 3, 2, 2), float(step)).to(memory_format=torch.channels_last),
        "transposed": (torch.arange(6).view(2, 3) * step).t(),
        "bf16": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(step),
        "flag": torch.tensor(step % 2 == 0),
        "empty": torch.zeros(0, 5),
    }


META = {"step": 7, "note": "é\u202e", "nested": {"list": [1, 2.5, None, True]}}


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensors[name], tensor)]  # including NaN and -0
        assert torch.equal(*raw)


def test_tensors_are_loaded_bit_identically(tmp_path: Path) -> None:
    path = save(tmp_path / "new folder", 7, tensors_of(7), META)
    assert path.name == "step-000000007.safetensors"
    tensors, meta = load(path, tensors_of(0))
    assert_same(tensors, tensors_of(7))
    assert meta == META == verify(path)
    assert sidecar(path).read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    if shutil.which("sha256sum"):
        command = ["sha256sum", "-c", sidecar(path).name]
        assert subprocess.run(command, cwd=path.parent, capture_output=True).returncode == 0
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, sidecar(path).name]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_checkpoint_has_the_mode_of_other_files(tmp_path: Path, umask: int) -> None:
    """Whoever may read the metrics of a run may read its weights; safetensors writes files for their owner only."""
    before = os.umask(umask)
    try:
        path = save(tmp_path, 7, tensors_of(7), META)
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path, sidecar(path))] == [0o666 & ~umask] * 2


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors_of(1), {})
    tensors, _ = load(path, tensors_of(0))
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(tensors, tensors_of(1))


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors_of(1), {"try": 1})
    path = save(tmp_path, 1, tensors_of(2), {"try": 2})
    assert load(path, tensors_of(0))[1] == {"try": 2}
    assert len(sidecar(path).read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"), 3, tensors_of(3), META)


def refusal(path: Path) -> str:
    """The one-line message with which `load` rejects a checkpoint; `verify` must reject it too."""
    with pytest.raises(CheckpointError) as caught:
        load(path, tensors_of(3))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        verify(path)
    return str(caught.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_rejected(saved: Path, data: st.DataObject) -> None:
    for file in (saved, sidecar(saved)):
        content = file.read_bytes()
        header_bytes = 8 + struct.unpack("<Q", saved.read_bytes()[:8])[0]
        regions = [(0, 8), (8, header_bytes), (header_bytes, len(content))] if file == saved else [(0, 64)]
        low, high = data.draw(st.sampled_from(regions))
        position, bit = data.draw(st.integers(low, high - 1)), data.draw(st.integers(0, 7))
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        try:
            file.write_bytes(damaged)
            assert saved.name in refusal(saved)
        finally:
            file.write_bytes(content)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_lengthened_and_random_files_are_rejected(saved: Path, data: st.DataObject) -> None:
    content = saved.read_bytes()
    damaged = data.draw(
        st.integers(0, len(content) - 1).map(lambda n: content[:n])
        | st.binary(min_size=1, max_size=20).map(lambda tail: content + tail)
        | st.binary(max_size=200)
    )
    record = sidecar(saved).read_bytes()
    try:
        saved.write_bytes(damaged)
        assert saved.name in refusal(saved)
        sidecar(saved).write_text(f"{sha256(saved)}  {saved.name}\n")  # even if the hash matches
        assert saved.name in refusal(saved)
    finally:
        saved.write_bytes(content)
        sidecar(saved).write_bytes(record)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},  # 4 TB claimed
        {"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 16]}},  # a size that overflows
        {
            "x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "__metadata__": {"format": "1", "meta": "[" * 9999},
        },
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"format": "1", "meta": "[]"}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"format": "2", "meta": "{}"}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    ],
    ids=["huge", "overflow", "deep", "not an object", "newer", "foreign"],
)
def test_a_hostile_or_foreign_header_is_rejected_before_allocation(tmp_path: Path, header: dict) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "step-000000001.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    sidecar(path).write_text(f"{sha256(path)}  {path.name}\n")
    with pytest.raises(CheckpointError):
        load(path, {"x": ((4,), torch.float32)})


def test_a_file_far_too_large_is_rejected_by_its_header_without_hashing(tmp_path: Path) -> None:
    floats = 75_000_000
    text = json.dumps(
        {
            "__metadata__": {"format": "1", "meta": "{}"},
            "x": {"dtype": "F32", "shape": [floats], "data_offsets": [0, 4 * floats]},
        }
    ).encode()
    path = tmp_path / "step-000000001.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + 4 * floats)  # 300 MB of holes
    sidecar(path).write_text(f"{'0' * 64}  {path.name}\n")
    with pytest.raises(CheckpointError, match=r"x is float32 \[75000000\], expected float32 \[4\]"):
        load(path, {"x": ((4,), torch.float32)})


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.safetensors"
    path.write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "executed") + b"'\ntR.")
    sidecar(path).write_text(f"{sha256(path)}  {path.name}\n")
    assert f"{path} cannot be read" in refusal(path)
    assert not (tmp_path / "executed").exists()


def test_another_model_is_rejected_with_every_difference(saved: Path) -> None:
    expected = tensors_of(3)
    expected["weight"] = torch.zeros(3, 8)
    expected["bf16"] = torch.zeros(3)
    del expected["flag"]
    expected["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load(saved, expected)
    message = str(caught.value)
    assert "weight is float32 [3, 4], expected float32 [3, 8]" in message
    assert "bf16 is bfloat16 [3], expected float32 [3]" in message
    assert "extra is missing" in message
    assert "'flag' is not in this model" in message


def test_the_error_for_a_missing_or_unverifiable_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.safetensors"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(path, {})
    os.mkfifo(path)  # opening a pipe would block forever
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(path, {})
    path.unlink()
    save(tmp_path, 1, tensors_of(1), {})
    sidecar(path).unlink()
    with pytest.raises(CheckpointError, match="copy both files"):
        load(path, tensors_of(1))


def test_newest_skips_corrupt_checkpoints_with_a_warning(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") == (None, [])
    assert newest(tmp_path) == (None, [])
    paths = [save(tmp_path, step, tensors_of(step), {}) for step in (9, 10, 1_000_000_000)]
    assert newest(tmp_path) == (paths[2], [])
    for damaged in (paths[2], paths[1]):
        damaged.write_bytes(damaged.read_bytes()[:-1])
    path, warnings = newest(tmp_path)
    assert path == paths[0]
    assert [str(path) in line for path, line in zip(paths[:0:-1], warnings, strict=True)] == [True, True]
    paths[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        newest(tmp_path)


def test_prune_keeps_the_newest_and_always_one_that_verifies(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, tensors_of(step), {}) for step in range(5)]
    assert prune(tmp_path, keep=5) == []
    assert prune(tmp_path, keep=3) == [paths[1], paths[0]]
    for damaged in paths[3:]:
        damaged.write_bytes(b"damaged")
    assert prune(tmp_path, keep=1) == [paths[3]]
    assert newest(tmp_path)[0] == paths[2]
    paths[2].write_bytes(b"damaged")
    assert prune(tmp_path, keep=1) == []  # none verifies: keep all, which may be recoverable


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors_of(1), {})
    leftovers = ["step-000000002.safetensors.sha256", "step-000000002.safetensors.tmp"]
    leftovers.append("step-000000002.safetensors.sha256.tmp")
    for name in [*leftovers, "notes.tmp", "other.sha256"]:
        (tmp_path / name).write_text("")
    assert sorted(p.name for p in sweep(tmp_path)) == sorted(leftovers)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [path.name, sidecar(path).name, "notes.tmp", "other.sha256"]
    )


def test_too_little_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1, tensors_of(1), {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes .* 1000 bytes free"):
        save(tmp_path, 2, tensors_of(2), {})
    assert newest(tmp_path) == (path, [])
    assert len(list(tmp_path.iterdir())) == 2
