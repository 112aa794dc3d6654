"""A row of a script that cannot be opened or read is listed with the reason, and all others are measured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import compare_peers, loaders, neighbours, report, roofline, scaling, train
from benchmarks.measure import end_to_end
from fastmoco.errors import ConfigError, RankLostError
from pipelines.backends.select import open_source

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def small(name: str) -> dict[str, Any]:
    return {"data": "shapes", "limit": 32, "quick": True, "device": "cpu", "workers": 0} | {"backends": name}


def test_a_loader_that_fails_in_a_reading_and_a_baseline_that_cannot_open_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, *others: Any) -> Any:
        if name == loaders.BASELINE:
            raise RuntimeError("no shared memory")
        return open_source(name, *others)

    measured, calls = loaders._measure, []

    def measure(case: loaders.Case, *others: Any) -> dict[str, float]:
        calls.append(case.name)
        if case.name == "torch" and calls.count("torch") == 2:
            raise OUT_OF_MEMORY
        return measured(case, *others)

    monkeypatch.setattr(loaders, "open_source", opened)
    monkeypatch.setattr(loaders, "_measure", measure)
    settings = loaders.Settings(**small("resident,torch"), batch_size=8, out=tmp_path, crop_size=16)
    loaders.main(settings, quiet())
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert list(result["cases"]) == ["resident"]
    assert result["cases"]["resident"]["ratio_to_control"] is None
    assert result["left_out"] == {
        loaders.BASELINE: "RuntimeError: no shared memory",
        "torch": "too little memory for another 2.00 GiB (in round 2 of 2)",
    }
    assert "no shared memory" in report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and loaders that need no time; a case without a time to open is a step alone."""
    engine: Any = SimpleNamespace(synthetic=[], warm_up_s=0.0)

    def opened(*arguments: Any) -> end_to_end.Case:
        return end_to_end.Case(lambda: iter(()), arguments[-1], 8, open_s=1.0)

    for name in ("our_engine", "plain_engine"):
        monkeypatch.setattr(train, name, lambda *_: engine)
    monkeypatch.setattr(train, "open_case", opened)
    monkeypatch.setattr(train, "measure", lambda *_: {"images_per_s": 5.0, "data_wait_percent": 1.0})


def train_settings(folder: Path, pipelines: str) -> train.Settings:
    return train.Settings(
        data="shapes", limit=32, pipelines=pipelines, quick=True, device="cpu", workers=0, out=folder
    )  # fmt: skip


@pytest.mark.usefixtures("simulated")
def test_training_without_our_step_still_measures_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ConfigError("the training step cannot be captured as a CUDA graph")

    monkeypatch.setattr(train, "our_engine", refuse)
    result = train.main(train_settings(tmp_path, "resident,plain"), quiet())
    assert list(result["cases"]) == [end_to_end.PLAIN]
    assert list(result["step_only"]) == ["plain"]
    assert "cannot be captured" in result["left_out"]["resident"]
    assert json.loads((tmp_path / "train-cifar.json").read_text())["complete"]


@pytest.mark.usefixtures("simulated")
def test_pipelines_are_measured_where_the_step_alone_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: end_to_end.Case, *_: Any) -> dict[str, float]:
        if case.open_s == 0.0:
            raise RuntimeError("CUDA error")
        return {"images_per_s": 5.0, "data_wait_percent": 1.0}

    monkeypatch.setattr(train, "measure", measure)
    result = train.main(train_settings(tmp_path, "resident"), quiet())
    assert "share_of_step_only" not in result["cases"]["resident"]
    assert result["left_out"] == {train.STEP: "RuntimeError: CUDA error (in round 1 of 2)"}
    assert "5.00 images/s" in report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")


def test_peers_are_measured_where_ours_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device")

    def opened(name: str, *_: Any, **__: Any) -> Any:
        if name == "authors-best":
            raise OUT_OF_MEMORY
        return compare_peers.Row(end_to_end.Case(lambda: iter(()), None, 8), "fp32")

    monkeypatch.setattr("benchmarks.peers.contenders.our_engine", refuse)
    monkeypatch.setattr(compare_peers, "open_peer", opened)
    monkeypatch.setattr(compare_peers, "start_fork_server", lambda peers: None)
    monkeypatch.setattr(compare_peers, "measure", lambda *_: {"images_per_s": 5.0})
    settings = compare_peers.Settings(
        data="shapes", limit=32, rows="fastmoco-resident,fastmoco-torch,authors,authors-best", quick=True,
        device="cpu", out=tmp_path,
    )  # fmt: skip
    compare_peers.main(settings, quiet())
    result = json.loads((tmp_path / "peers-cifar.json").read_text())
    assert list(result["rows"]) == ["authors"]
    assert result["ratios"] == {}
    assert result["left_out"].keys() == {"fastmoco-resident", "fastmoco-torch", "authors-best"}
    assert "no kernel image" in result["left_out"]["fastmoco-torch"]
    assert "no kernel image" in report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")


def test_a_number_format_that_a_device_lacks_is_left_out_of_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    product = roofline._product

    def lacks_bf16(name: str, *others: Any) -> Any:
        if name == "bf16":
            raise RuntimeError("bf16 is not supported")
        return product(name, *others)

    monkeypatch.setattr(roofline, "_product", lacks_bf16)
    monkeypatch.setattr(roofline, "formats_on", lambda device: ("fp32", "bf16"))
    left_out: dict[str, str] = {}
    ceilings = roofline.measure_ceilings(
        torch.device("cpu"), roofline.Settings(quick=True, seconds=0.01, repetitions=1), left_out
    )
    assert ceilings.keys() == {"fp32", roofline.COPY}
    assert left_out == {"bf16": "RuntimeError: bf16 is not supported"}


def test_a_training_process_that_dies_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, pipeline: str, kind: str, *_: Any) -> None:
            self.kind, self.reads = kind, 0

        def read(self) -> dict[str, float]:
            self.reads += 1
            if self.kind == "fixed" and self.reads == 2:
                raise RankLostError("the process of resident fixed has died")
            return {"images_per_s": 5.0, "threads": 2.0}

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(neighbours, "TrainingProcess", Process)
    settings = neighbours.Settings(pipelines="resident", neighbours="0", threads="tuned,fixed", out=tmp_path)
    neighbours.main(settings, quiet())
    result = json.loads((tmp_path / "neighbours.json").read_text())
    assert [(row["threads"], len(row["images_per_s"]["values"])) for row in result["rows"]] == [("tuned", 3)]
    assert result["rows"][0]["to_fixed"] is None
    assert result["left_out"] == {"resident fixed": "the process of resident fixed has died"}


def test_an_axis_that_fails_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        memory: dict[str, float] = {}  # noqa: RUF012 - never changed

        def __init__(self, variant: Any, task: Any, *_: Any) -> None:
            self.fails = variant.name == "plain" and task.batch_size == 32

        def __call__(self) -> dict[str, float]:
            if self.fails:
                raise RuntimeError("CUDA error")
            return {"ms": 1.0, "images_per_s": 5.0}

    def no_ranks(*_: Any, **__: Any) -> Any:
        raise RankLostError("NCCL is missing")

    monkeypatch.setattr(scaling, "Runner", Runner)
    monkeypatch.setattr(scaling, "Ranks", no_ranks)
    settings = scaling.Settings(axis="ranks,batch", batch_size=32, device="cpu", out=tmp_path)
    scaling.main(settings, quiet())
    result = json.loads((tmp_path / "scaling-cifar.json").read_text())
    assert list(result["axes"]) == ["batch"]
    assert "1 ranks: NCCL is missing" in result["left_out"]["ranks"]
    batch = result["axes"]["batch"]
    assert "CUDA error" in batch["left_out"]["plain at 32"]
    assert [row["point"] for row in batch["rows"] if row["case"] == "plain"] == [8, 16, 64]
    assert "NCCL is missing" in report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")
