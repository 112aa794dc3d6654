"""Files that become bad during training: replaced by grey on every backend, recorded once, and limited in number."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from pipelines.augment.presets import V1
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.dataset import load_dataset
from pipelines.data.quarantine import REPLACED, Entry, Ledger
from pipelines.errors import DataError
from pipelines.plan.planner import Planner
from tests.oddities import encode, fill, picture
from tools import make_ffcv

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "f", *(f"{i}.png" for i in range(10, 30)))


def spoil(folder: Path) -> list[str]:
    """Damages three files after indexing: one deleted, one truncated, one replaced by another picture."""
    (folder / "12.png").unlink()
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:-20])
    (folder / "25.png").write_bytes(encode(picture(9, 9), "PNG"))
    return [str(folder / f"{i}.png") for i in (12, 17, 25)]


@pytest.mark.parametrize("name", ["torch", "resident", "dali", "dataloader"])
def test_every_pipeline_replaces_it_by_grey(folder, tmp_path, name, require_backend):
    if name == "dali":
        require_backend("dali")
    ledger = Ledger(str(tmp_path / "quarantine.jsonl"), most=3)
    index = load_dataset(str(folder), data_root=tmp_path).with_ledger(ledger).train
    bad = spoil(folder)
    planner = Planner(index.sizes, seed=0, batch_size=len(index), augmentation=V1, shuffle_keys=False)
    source = open_source(name, index, 8, CPU, 1 if name == "dali" else 0)
    pipeline = open_pipeline(name, index, planner, source, 8, CPU, torch.float32, 0)
    views = [next(iter(pipeline.views(step, step + 1))) for step in (0, 1)]  # two epochs
    pipeline.close()
    entries = ledger.entries()
    assert sorted(entry.image for entry in entries) == bad
    assert {entry.fate for entry in entries} == {REPLACED}
    flat = {
        int(i) for v in views for i, view in zip(v.index, v.query, strict=True) if view.flatten(1).std(1).max() < 1e-4
    }
    assert flat == {2, 7, 15}


def test_ffcv_replaces_a_bad_record_by_grey(tmp_path, require_backend):
    """In the open `.beton`: one overwritten by noise, one by another picture, and the last one truncated."""
    require_backend("ffcv")
    folder, beton = tmp_path / "f", tmp_path / "train.beton"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.jpg").write_bytes(encode(picture(20 + i, 40), "JPEG"))
    convert = make_ffcv.Settings(data=(str(folder),), out=str(beton), workers=1)
    make_ffcv.convert(load_dataset(str(folder), data_root=tmp_path).train, convert, Console(quiet=True))
    ledger = Ledger(str(tmp_path / "quarantine.jsonl"), most=3)
    index = load_dataset(str(beton), data_root=tmp_path).with_ledger(ledger).train
    planner = Planner(index.sizes, seed=0, batch_size=len(index), augmentation=V1, shuffle_keys=False)
    source = open_source("ffcv", index, 8, CPU, 2)
    assert index.records is not None
    (last,) = np.flatnonzero(index.records.offsets == index.records.offsets.max()).tolist()
    noise, other = {2, 7} if last not in (2, 7) else {3, 8}
    with beton.open("r+b") as file:
        for i, content in ((noise, b"no image"), (other, encode(picture(9, 9), "JPEG"))):
            file.seek(index.records.offsets[i])
            file.write(content.ljust(index.records.lengths[i], b"\0")[: index.records.lengths[i]])
        file.truncate(index.records.offsets[last] + index.records.lengths[last] - 1)
    pipeline = open_pipeline("ffcv", index, planner, source, 8, CPU, torch.float32, 2)
    views = [next(iter(pipeline.views(step, step + 1))) for step in (0, 1)]  # two epochs
    entries = ledger.entries()
    assert sorted(entry.image for entry in entries) == sorted(index.display_name(i) for i in (noise, other, last))
    assert {entry.fate for entry in entries} == {REPLACED}
    flat = {
        int(i) for v in views for i, view in zip(v.index, v.query, strict=True) if view.flatten(1).std(1).max() < 1e-4
    }
    assert flat == {noise, other, last}
    pipeline.close()
    fewer = replace(index, ledger=Ledger(str(tmp_path / "fewer.jsonl"), most=2))
    source = open_source("ffcv", fewer, 8, CPU, 2)
    pipeline = open_pipeline("ffcv", fewer, planner, source, 8, CPU, torch.float32, 2)
    with pytest.raises(DataError, match="already lists 2 bad images, the maximum"):
        next(iter(pipeline.views(0, 1)))
    pipeline.close()


def test_without_a_ledger_it_is_an_error(folder, tmp_path):
    index = load_dataset(str(folder), data_root=tmp_path).train
    spoil(folder)
    for i in (2, 7, 15):
        with pytest.raises(DataError, match=index.display_name(i)):
            index.read(i)


def test_one_more_than_allowed_is_an_error(folder, tmp_path):
    index = load_dataset(str(folder), data_root=tmp_path).with_ledger(Ledger(str(tmp_path / "q"), most=2)).train
    spoil(folder)
    assert (index.read(2) == 128).all()
    assert (index.read(7) == 128).all()
    assert index.read(7).shape == (4, 3, 3)  # a second time: no new entry
    with pytest.raises(DataError, match=r"25\.png is 9×9 pixels .*/q already lists 2 bad images, the maximum"):
        index.read(15)


def test_an_image_is_recorded_once_by_many_writers_and_after_a_torn_line(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"image": "torn\n')
    ledger = Ledger(str(path), most=50)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ledger.note(Entry(f"{i % 20}.png", "why", REPLACED)), range(200)))
    assert sorted(entry.image for entry in ledger.entries()) == sorted(f"{i}.png" for i in range(20))
    assert len(path.read_bytes().splitlines()) == 21


def test_a_ledger_that_cannot_be_written_replaces_nothing(folder, tmp_path):
    index = load_dataset(str(folder), data_root=tmp_path).with_ledger(Ledger(str(tmp_path / "no" / "q"), most=9)).train
    spoil(folder)
    with pytest.raises(DataError, match=r"12\.png .*it cannot be recorded in .*/no/q .No such file"):
        index.read(2)


def test_a_run_continues_and_reports(folder, tmp_path, capsys, monkeypatch):
    """One file is bad before the start, and one is deleted after indexing."""
    (folder / "20.png").write_bytes(b"no image")
    from fastmoco.run import start as module

    def load_then_delete(*arguments, **options):
        dataset = load_dataset(*arguments, **options)
        (folder / "12.png").unlink()
        return dataset

    monkeypatch.setattr(module, "load_dataset", load_then_delete)
    flags = "--bad-images quarantine --batch-size 8 --moco-k 16 --width 0.125 --arch resnet18 --crop-size 8 --epochs 1"
    flags += " --amp fp32 --bn-splits 1 --knn-every 0 --no-tensorboard --device cpu --pipeline resident --workers 1"
    out = tmp_path / "run"
    assert main(["train", "--data", str(folder), "--out", str(out), *flags.split()]) == ExitCode.DONE
    output = capsys.readouterr().out
    assert "left out" in output
    assert "1 image has turned bad, replaced by grey (see quarantine.jsonl): cannot read" in output
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(line["image"]).name, line["fate"]) for line in lines] == [
        ("20.png", "left out"),
        ("12.png", "replaced by grey"),
    ]
    assert np.isfinite(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"])
