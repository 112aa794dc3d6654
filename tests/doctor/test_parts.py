"""Pipelines, steps, compilation and ranks: what is right, an error in each, and what is missing."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fastmoco.device import pick_amp
from fastmoco.doctor import loading, ranks, steps
from fastmoco.doctor.findings import Status, Target
from pipelines.errors import BackendMissingError


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is one call or two batches."""
    monkeypatch.setattr("fastmoco.doctor.units.MAX_CALLS", 1)
    monkeypatch.setattr(loading, "_MEASURED_S", 0.0)
    monkeypatch.setattr(loading, "_MAX_BATCHES", 2)


@pytest.mark.parametrize("name", ["resident", "dataloader", "dali", "ffcv"])
def test_pipelines_decode_the_same(target: Target, name: str, require_backend: Any) -> None:
    if name in ("dali", "ffcv"):
        require_backend(name)
    finding = getattr(loading, name)(target)
    assert finding.status == Status.OK, finding
    assert finding.figures["mean_difference_levels"] < 0.5
    assert finding.figures["images_per_s"] > 0


@pytest.mark.slow
def test_worker_processes_decode_the_same(target: Target) -> None:
    assert loading.workers(target).status == Status.OK


def test_wrong_pixels_are_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = loading.expected_crops
    monkeypatch.setattr(loading, "expected_crops", lambda index, plan: correct(index, plan).flip(2))
    finding = loading.resident(target)
    assert finding.status == Status.FAILED
    assert "another --pipeline than resident" in finding.advice


@pytest.mark.parametrize(
    ("name", "command"), [("dali", "uv sync --inexact --extra dali"), ("ffcv", "libturbojpeg0-dev")]
)
def test_a_missing_pipeline_says_what_it_would_bring(
    target: Target, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    def refuse(*_: Any) -> None:
        raise BackendMissingError(f"--pipeline {name} is not installed")

    monkeypatch.setattr(loading, "open_source", refuse)
    finding = getattr(loading, name)(target)
    assert finding.status == Status.MISSING
    assert command in finding.advice


def test_a_training_step_is_right(target: Target) -> None:
    finding = steps.eager(target)
    assert finding.status == Status.OK, finding
    assert steps.graph(target).status == Status.SKIPPED


def test_a_wrong_loss_is_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    correct = steps.random_views

    def views(device: torch.device, amp: str) -> Any:
        found = correct(device, amp)
        calls.append(amp)
        if len(calls) == 2:  # those of the device, after those of the reference
            found.query.fill_(float("nan"))
        return found

    monkeypatch.setattr(steps, "random_views", views)
    finding = steps.eager(target)
    assert finding.status == Status.FAILED
    assert pick_amp("auto", torch.device("cpu")) in finding.text


def test_compile_without_a_compiler_is_missing(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    finding = steps.compiled(target)
    assert finding.status == Status.MISSING
    assert "apt-get install g++" in finding.advice


def test_a_wrong_compiled_function_is_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x, scale: 1.001 * function(x, scale))
    assert steps.compiled(target).status == Status.FAILED
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert steps.compiled(target).status == Status.OK


def test_ranks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "try_all_reduce", lambda *_: 0.01)
    assert ranks.gloo(target).status == Status.OK
    assert ranks.nccl(target).status == Status.SKIPPED
    found = ranks.nccl(target._replace(device="cuda:0", gpus=16))
    assert found.figures["ranks"] == 8 or found.status == Status.MISSING

    def refuse(*_: Any) -> float:
        raise RuntimeError("rank 1 exited without a result")

    monkeypatch.setattr(ranks, "try_all_reduce", refuse)
    failed = ranks.gloo(target)
    assert (failed.status, failed.text) == (Status.FAILED, "rank 1 exited without a result")
    monkeypatch.setattr(ranks, "is_available", lambda _: False)
    assert ranks.gloo(target).status == Status.MISSING
