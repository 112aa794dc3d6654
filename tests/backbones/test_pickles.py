"""A pickle is read as data: what it names is not imported, what it calls is not called, and it costs what it weighs."""

from __future__ import annotations

import builtins
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from fastmoco.backbones import pickles
from fastmoco.backbones.pickles import Named, Object, read_pickle
from fastmoco.backbones.read import read_backbone
from fastmoco.backbones.torch_files import read_torch
from fastmoco.errors import CheckpointError
from tests.backbones.test_other_trainers import assert_same, resnet


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Slots:
    """Pickled with a state for `__setstate__` and for slots."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Slots, (), ({"a": 1}, {"__class__": 2})


def attacks(target: Path) -> dict[str, Any]:
    """Each makes a folder if anything of it is executed."""
    path = str(target)
    return {
        "os": Call(os.mkdir, path),
        "shell": Call(os.system, f"mkdir {path}"),
        "eval": Call(eval, f"__import__('os').mkdir({path!r})"),
        "getattr": Call(getattr, Call(__import__, "os"), "mkdir"),
        "partial": Call(functools.partial, os.mkdir, path),
        "map": Call(list, Call(map, os.mkdir, [path])),
        "subprocess": Call(subprocess.Popen, ["mkdir", path]),
        "torch": Call(torch.save, 1, path),
        "torch.load": Call(torch.load, path),
        "numpy": Call(np.save, path, 1),
        "open": Call(open, path, "w"),
        "exec": Call(builtins.exec, f"open({path!r}, 'w')"),
        "rebuild": Call(_rebuild_tensor_v2, Call(os.mkdir, path), 0, (1,), (1,), False, {}),
        "dict": Call(dict, Call(zip, [path], Call(map, os.mkdir, [path]))),
    }


@pytest.mark.parametrize("name", attacks(Path()))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_nothing_is_called(tmp_path: Path, name: str, zipped: bool) -> None:
    attack, model = attacks(tmp_path / "executed")[name], resnet(0)
    content = {"first": attack, "state_dict": model.state_dict(), attack: 1, "last": {"a": [attack]}}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_backbone(tmp_path / "file.pth"), model)
    assert not (tmp_path / "executed").exists()


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "module_of_others.py").write_text("raise SystemExit('imported')\nclass A: pass\n")
    data = b"\x80\x02cmodule_of_others\nA\n)\x81}b."
    value = read_pickle(io.BytesIO(data)).value
    assert isinstance(value, Object)
    assert isinstance(value.of, Named)
    assert value.of.path == "module_of_others.A"
    assert "module_of_others" not in sys.modules


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_that_were_pickled(protocol: int) -> None:
    value = {"a": [1, -1, 2**40, 2**70, 1.5, None, True, False, ()], "b": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))}
    value |= {"ü": "ß\n", "long": "x" * 300, "empty": {}, 5: [[]], "again": value["a"]}
    for data in (pickle.dumps(value, protocol), pickle._dumps(value, protocol)):  # pyright: ignore
        assert read_pickle(io.BytesIO(data + b"rest")).value == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_object_of_pickle_leaves_the_rest(protocol: int) -> None:
    value = [
        {1, 2},
        frozenset({3}),
        Slots(),
        b"bytes",
        bytearray(b"b"),
        1j,
        np.float64(2),
        np.arange(3),
        range(3),
        "end",
    ]
    found = read_pickle(io.BytesIO(pickle.dumps(value, protocol))).value
    assert len(found) == len(value)
    assert found[-1] == "end"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x02", b".", b"\x80\x02K\x01", b"\x80\x02}K\x01s.", b"\x80\x02h\x05.", b"\x80\x02\x85.", b"\x80\x02t.",
     b"\x80\x02K\x01K\x02K\x03s.", b"\x80\x02\x82\x01.", b"\xff", b"\x80\x02(K\x01e.",
     b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02r\xff\xff\xff\xff.",
     b"\x80\x02K\x01K\x01\x93."],
)  # fmt: skip
def test_damaged_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.pth").write_bytes(b"\x80" + data[1:] if data else b"\x80")
    with pytest.raises(CheckpointError):
        read_torch(tmp_path / "file.pth")


def test_costs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memo index of 4 billion, a tuple that takes 2**60 steps to hash, and one that contains itself 2**60 times."""
    dumps = {
        "memo": b"\x80\x02K\x01r\xff\xff\xff\xff.",
        "hash": b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.",
        "laughs": b"\x80\x02}X\x01\x00\x00\x00aK\x01" + b"2\x86" * 60 + b"s.",
    }
    for name, data in dumps.items():
        (tmp_path / name).write_bytes(data)
        began = time.monotonic()
        assert not read_torch(tmp_path / name).shapes
        assert time.monotonic() - began < 5, name
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1000)
    assert read_pickle(io.BytesIO(b"\x80\x02" + b"]0" * 498 + b"].")).value == []
    with pytest.raises(ValueError, match="more than 1,000 instructions"):
        read_pickle(io.BytesIO(b"\x80\x02" + b"]0" * 499 + b"]."))


def forged(path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...], numel: int = 4) -> Path:
    """A zip file of one tensor with four values, described as the arguments say."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for part in source.infolist():
            data = source.read(part)
            if part.filename.endswith("data.pkl"):
                old = b"K\x00K\x04\x85q\x08K\x01\x85q\t"
                assert old in data
                numbers = [b"J" + struct.pack("<i", n) for n in (offset, *size, *stride)]
                new = numbers[0] + b"(" + b"".join(numbers[1 : 1 + len(size)]) + b"t("
                data = data.replace(old, new + b"".join(numbers[1 + len(size) :]) + b"t")
                data = data.replace(b"cpuq\x06K\x04", b"cpuq\x06J" + struct.pack("<i", numel))
            target.writestr(part.filename, data)
    return path


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(1, (4,), (1,)), (0, (5,), (1,)), (0, (2, 2), (4, 1)), (0, (2,), (2**31 - 1,)), (2**31 - 1, (1,), (1,))],
)
def test_a_tensor_beyond_its_values_is_refused(tmp_path: Path, offset: int, size: Any, stride: Any) -> None:
    file = read_torch(forged(tmp_path / "file.pth", offset, size, stride, numel=2**20))
    with pytest.raises(ValueError, match="it is damaged: a needs"):
        file.load(["a"])


def test_negative_sizes_are_no_tensor(tmp_path: Path) -> None:
    assert not read_torch(forged(tmp_path / "a.pth", 0, (-1,), (1,))).shapes
    assert not read_torch(forged(tmp_path / "b.pth", 0, (2,), (-1,))).shapes
    assert not read_torch(forged(tmp_path / "c.pth", -1, (2,), (1,))).shapes


def test_the_forged_file_is_good_with_the_right_numbers(tmp_path: Path) -> None:
    file = read_torch(forged(tmp_path / "file.pth", 1, (2, 2), (1, 1)))
    assert file.load(["a"])["a"].tolist() == [[1, 2], [2, 3]]
