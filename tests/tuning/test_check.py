"""A right implementation passes, at every number format; a wrong one is found, and named by what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.tuning import check
from fastmoco.tuning.candidates import Candidate
from fastmoco.tuning.check import Checker, views_failure
from tests.step.test_cuda_graph import Recorder
from tests.tuning.tiny import BATCH, CPU, FAULTS, IMAGES, tiny_config, tiny_views


def checker(graph: Callable[..., GraphedStep] = GraphedStep, **options) -> Checker:
    return Checker(tiny_config(**options), tiny_views(), IMAGES, CPU, graph)


@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
def test_right_kernels_pass(require_backend, amp: str) -> None:
    """Triton's kernels, in its interpreter without a GPU."""
    require_backend("triton")
    verdict = checker().check(Candidate(amp=amp, kernels="triton"))
    assert verdict.failure is None
    assert verdict.errors["gradient backbone.conv1.weight"] < (1e-3 if amp == "fp32" else 1.0)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("mechanism", ["queue", "end-to-end", "memory-bank"])
def test_plain_16_bit_formats_pass(amp: str, mechanism: str) -> None:
    verdict = checker(mechanism=mechanism, moco_k=BATCH if mechanism == "end-to-end" else 32).check(Candidate(amp=amp))
    assert verdict.failure is None
    assert "loss" in str(verdict)


def test_a_contiguous_stem_passes() -> None:
    assert checker().check(Candidate(amp="fp32", stem_format="contiguous")).failure is None


@pytest.mark.parametrize("amp", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", FAULTS)
def test_wrong_kernels_are_found(implementation, group: str, amp: str) -> None:
    implementation["triton"] = FAULTS[group]
    failure = checker().check(Candidate(amp=amp, kernels="triton")).failure
    assert failure is not None
    assert "differs by" in failure
    found = failure.removeprefix("in float32, ").split(" ")[0]
    follows = {"loss": {"loss", "gradient", "query", "key"}, "gradient": {"gradient", "query", "key"}}
    assert found in follows.get(group, {group}), failure


def test_a_16_bit_format_that_is_wrong_is_found(implementation) -> None:
    def scale_features(step) -> None:
        step.model.query.head.register_forward_hook(lambda module, inputs, output: -output)

    implementation["bf16"] = scale_features
    failure = checker().check(Candidate(amp="bf16")).failure
    assert failure is not None
    assert failure.startswith("loss differs by")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "out of memory"),
        (BackendMissingError("no compiler"), "no compiler"),
        (RuntimeError("PTX was built for another device\nat line 3"), "RuntimeError: PTX was built for another device"),
    ],
    ids=["memory", "backend", "runtime"],
)
def test_an_error_is_a_failure_of_one_line(implementation, error: Exception, text: str) -> None:
    implementation["triton"] = error
    assert checker().check(Candidate(amp="fp32", kernels="triton")).failure == text


def test_a_captured_step_is_compared_too() -> None:
    graphed = Candidate(amp="fp32", cuda_graph="on")
    assert checker(lambda step, views: GraphedStep(step, views, Recorder())).check(graphed).failure is None

    class Stale(Recorder):
        """Replays nothing."""

        def replay(self) -> None:
            self.replays += 1

    failure = checker(lambda step, views: GraphedStep(step, views, Stale())).check(graphed).failure
    assert failure is not None
    refused = checker(lambda step, views: GraphedStep(step, views, Recorder(RuntimeError("not permitted"))))
    assert "cannot be captured as a CUDA graph (not permitted)" in (refused.check(graphed).failure or "")


def test_a_step_is_not_compared_again_before_it_is_captured(implementation, monkeypatch) -> None:
    build, built = check.build_for, []

    def counted(candidate, *args):
        built.append(candidate)
        return build(candidate, *args)

    monkeypatch.setattr(check, "build_for", counted)
    checks = checker(lambda step, views: GraphedStep(step, views, Recorder()))
    eager = Candidate(amp="bf16", kernels="triton")
    verdict = checks.check(eager)
    assert len(built) == len(set(built)) + 1, "plain float32 is built again with perturbed weights"
    built.clear()
    graphed = Candidate(amp="bf16", kernels="triton", cuda_graph="on")
    assert checks.check(graphed).errors == verdict.errors
    assert built == [graphed]


def test_the_reference_uses_fewer_images_where_memory_is_short(implementation, monkeypatch) -> None:
    build = check.build_for

    def limited(candidate, config, count, *args):
        if candidate.amp == "fp32" and count > 4:
            raise torch.OutOfMemoryError("too large")
        return build(candidate, config, count, *args)

    monkeypatch.setattr(check, "build_for", limited)
    checks = checker()
    assert checks.images == BATCH
    assert checks.check(Candidate(amp="bf16")).failure is None
    assert checks.images == 4


def test_configuration_errors_are_failures_and_data_errors_are_not(implementation) -> None:
    from pipelines.errors import DataError

    implementation["triton"] = ConfigError("no")
    assert checker().check(Candidate(amp="fp32", kernels="triton")).failure == "no"
    implementation["triton"] = DataError("a file is damaged")
    with pytest.raises(DataError):
        checker().check(Candidate(amp="fp32", kernels="triton"))


def test_views_are_compared() -> None:
    reference = tiny_views()
    assert views_failure(tiny_views, reference) is None
    shifted = tiny_views()
    shifted.key.add_(0.05)
    assert "views differ by 0.025" in (views_failure(lambda: shifted, reference) or "")
    shifted.key.fill_(float("nan"))
    assert views_failure(lambda: shifted, reference) is not None

    def fails():
        raise RuntimeError("no kernel image")

    assert views_failure(fails, reference) == "RuntimeError: no kernel image"
