"""Which ways there are, by device and by what was given by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmoco.tuning import candidates
from fastmoco.tuning.candidates import Candidate, variations, without_graph
from tests.tuning.tiny import CPU, tiny_config

CUDA = torch.device("cuda", 0)
ALL = frozenset({"amp", "kernels", "compile", "cuda_graph", "stem_format", "prefetch", "cpu_threads"})
PREFERRED = Candidate("bf16", "triton", cuda_graph="on", prefetch="on")


def available(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """Triton and torch.compile, or what is missing for them."""
    monkeypatch.setattr(candidates, "triton_missing", lambda: missing)
    monkeypatch.setattr(candidates, "compiler_missing", lambda device: missing)


def names(found) -> list[tuple[str, str, str]]:
    return [(c.amp, c.kernels, c.compile) for c in found]


def test_the_order_of_preference_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    config = PREFERRED.apply(tiny_config())
    implementations = [("triton", "off"), ("torch", "default"), ("torch", "off")]
    expected = [(amp, *rest) for amp in ("bf16", "fp32") for rest in implementations]
    assert names(without_graph(config, ALL, CUDA)) == expected
    assert names(without_graph(config, ALL - {"amp", "kernels"}, CUDA)) == [("bf16", "triton", "off")]
    compiled = replace(PREFERRED, compile="default").apply(tiny_config())
    expected = [(amp, *rest) for amp in ("bf16", "fp32") for rest in (("triton", "default"), *implementations)]
    assert names(without_graph(compiled, ALL, CUDA)) == expected
    assert names(without_graph(compiled, frozenset({"compile"}), CUDA)) == [
        ("bf16", "triton", "default"), ("bf16", "triton", "off")]  # fmt: skip
    assert names(without_graph(compiled, frozenset({"kernels"}), CUDA)) == [
        ("bf16", "triton", "default"), ("bf16", "torch", "default")]  # fmt: skip
    assert names(without_graph(config, frozenset(), CUDA)) == [("bf16", "triton", "off")]
    available(monkeypatch, "not installed")
    config = Candidate("bf16", "torch").apply(tiny_config())
    assert names(without_graph(config, ALL, CUDA)) == [("bf16", "torch", "off"), ("fp32", "torch", "off")]


def test_activation_checkpointing_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    config = PREFERRED.apply(tiny_config(checkpoint_activations=True))
    assert {c.compile for c in without_graph(config, ALL, CUDA)} == {"off"}
    found = variations(PREFERRED, config, ALL, CUDA, compiles=True)
    assert {c.compile for dimension in found for c in dimension} == {"off"}


def test_dimensions_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, None)
    config = PREFERRED.apply(tiny_config())
    implementations, graphs, stems, loading = variations(PREFERRED, config, ALL, CUDA, compiles=True)
    assert names(implementations) == [
        ("bf16", "torch", "default"), ("bf16", "torch", "off"), ("bf16", "triton", "default")]  # fmt: skip
    assert all(c.cuda_graph == "on" for c in implementations)
    assert [c.cuda_graph for c in graphs] == ["off"]
    assert [c.stem_format for c in stems] == ["contiguous"]
    assert [c.prefetch for c in loading] == ["off"]
    assert {c.arithmetic for c in loading} == {PREFERRED.arithmetic}
    *_, last = variations(PREFERRED, PREFERRED.apply(tiny_config(pipeline="dataloader")), ALL, CUDA, compiles=True)
    assert last == stems, "it has its own way of preparing batches"
    quick, *_ = variations(PREFERRED, config, ALL, CUDA, compiles=False)
    assert names(quick) == [("bf16", "torch", "off")]


def test_fused_convolutions_are_tried_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "triton_missing", lambda: None)
    monkeypatch.setattr(candidates, "fuses_convolutions", lambda device: True)
    config = PREFERRED.apply(tiny_config(arch="resnet50"))
    fused = replace(PREFERRED, kernels="triton-fused")
    for compiles in (True, False):
        implementations, *_ = variations(PREFERRED, config, ALL, CUDA, compiles=compiles)
        assert fused in implementations
    for other, auto in ((config, ALL - {"kernels"}), (PREFERRED.apply(tiny_config()), ALL)):
        assert all(fused not in dimension for dimension in variations(PREFERRED, other, auto, CUDA, compiles=True))
    monkeypatch.setattr(candidates, "fuses_convolutions", lambda device: False)
    assert all(fused not in dimension for dimension in variations(PREFERRED, config, ALL, CUDA, compiles=True))


def test_dimensions_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_thread_counts", lambda: [2, 1])
    monkeypatch.setattr("shutil.which", lambda name: None)
    best = Candidate("fp32")
    found = variations(best, tiny_config(), ALL, CPU, compiles=True)
    assert found == [
        [],
        [Candidate("fp32", stem_format="contiguous")],
        [Candidate("fp32", cpu_threads=2), Candidate("fp32", cpu_threads=1)],
    ]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    compiled, *_ = variations(best, tiny_config(), ALL, CPU, compiles=True)
    assert compiled == [Candidate("fp32", compile="default")]
    assert variations(best, tiny_config(), frozenset(), CPU, compiles=True) == [[]]
