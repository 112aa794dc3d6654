"""A captured step does what the step does, starts from where it was, and refuses what it was not captured for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmoco.errors import ConfigError
from fastmoco.step.cuda_graph import WARM_UP, GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views
from tests.step.test_step_parity import EMA, LR, bits, changed, make_step, random_views, whole_state


class Recorder:
    """A graph without a device: a capture executes nothing, a replay everything, on the memory of the capture."""

    def __init__(self, refusal: RuntimeError | None = None) -> None:
        self.warm_ups = self.replays = 0
        self._refusal = refusal

    def warm_up(self, run: Callable[[], None]) -> None:
        self.warm_ups += 1
        run()

    def capture(self, run: Callable[[], None]) -> None:
        if self._refusal is not None:
            try:
                raise self._refusal
            finally:
                raise RuntimeError("the capture has ended in an error")  # as torch's context manager does
        self._run = run

    def replay(self) -> None:
        self.replays += 1
        self._run()


def batches(count: int, device: str = "cpu") -> list[Views]:
    generator = torch.Generator().manual_seed(9)
    return [random_views(generator, device=device) for _ in range(count)]


def started(**options) -> TrainStep:
    """A step in the middle of a run: one step done, and in float16 a scale that overflows nothing."""
    step = make_step(bn_splits=2, **options)
    if step.scaler is not None:
        step.scaler.scale.fill_(64.0)
    step(batches(1)[0], LR, EMA)
    return step


def everything(step: TrainStep) -> dict[str, Tensor]:
    """The model, the queue and all that the step keeps beside them, copied."""
    own = {f"{group}.{n}": t.clone() for group, named in step.state_dict().items() for n, t in named.items()}
    rounded = {"query": step.query.rounded, "key": step.key.rounded}
    return whole_state(step) | own | {f"rounded.{n}": t.clone() for n, t in rounded.items() if t is not None}


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 6), (torch.float16, 2)], ids=["float32", "float16"])
def test_a_captured_step_is_the_step_bit_for_bit(dtype: torch.dtype, steps: int) -> None:
    eager, captured = started(dtype=dtype), started(dtype=dtype)
    views = batches(4)
    graph = Recorder()
    step = GraphedStep(captured, views[0], graph)
    for number in range(steps):
        lr, ema = LR / (1 + number), min(1.0, EMA + 0.01 * number)
        eager(views[number % 4], lr, ema)
        step(views[number % 4], lr, ema)
    assert (graph.warm_ups, graph.replays) == (WARM_UP, steps)
    assert changed(everything(eager), everything(captured)) == []
    assert eager.read_metrics() == captured.read_metrics()


@pytest.mark.slow
def test_a_hundred_captured_steps_are_a_hundred_steps_bit_for_bit() -> None:
    eager, captured = started(symmetric=True), started(symmetric=True)
    views = batches(4)
    step = GraphedStep(captured, views[0], Recorder())
    for number in range(100):
        eager(views[number % 4], LR, EMA)
        step(views[number % 4], LR, EMA)
    assert changed(everything(eager), everything(captured)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_capturing_leaves_the_state_as_it_was(dtype: torch.dtype) -> None:
    step, views = started(dtype=dtype), batches(2)[1]
    before = everything(step)
    GraphedStep(step, views, Recorder())
    assert changed(before, everything(step)) == []
    assert step.query.is_intact()
    assert step.key.is_intact()
    step.run(views)
    assert len(changed(before, everything(step))) > 100, "a run changes what the capture has to put back"


def test_every_tensor_that_a_run_changes_is_listed() -> None:
    step = started(dtype=torch.float16)
    memory = [tensor.untyped_storage() for tensor in step.changed_tensors()]
    listed = [range(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in memory]
    live = {**step.model.state_dict(), **step.dictionary.state_dict()}
    live |= {n: t for named in step.state_dict().values() for n, t in named.items()}
    before = {name: tensor.clone() for name, tensor in live.items()}
    step(batches(2)[1], LR, EMA)
    moved = [name for name, tensor in live.items() if not torch.equal(bits(tensor), bits(before[name]))]
    assert {"pointer", "keys", "good_steps", "steps", "loss_sum", "query.head.0.weight"} <= {*moved}
    assert [name for name in moved if not any(live[name].data_ptr() in part for part in listed)] == []


def test_the_caller_keeps_its_views() -> None:
    step = make_step()
    views = batches(2)
    copies = [views[1].query.clone(), views[1].key.clone()]
    captured = GraphedStep(step, views[0], Recorder())
    captured(views[1], LR, EMA)
    views[1].query.zero_()
    captured(views[0], LR, EMA)
    assert torch.equal(views[1].key, copies[1])
    assert not torch.equal(views[0].query, copies[0])


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("query", lambda t: t[:8], r"views.query is 8×3×8×8 float32 on cpu, .* captured with 16×3×8×8 float32"),
        ("key", lambda t: t.to(torch.bfloat16), "views.key is 16×3×8×8 bfloat16 .* --cuda-graph off"),
        ("key_order", lambda t: t.to("meta"), "views.key_order is 16 int64 on meta"),
        ("index", lambda t: t.int(), "views.index is 16 int32"),
    ],
)
def test_other_views_than_captured_are_refused(field: str, change: Callable, message: str) -> None:
    step = make_step()
    views = batches(1)[0]
    captured = GraphedStep(step, views, Recorder())
    before = everything(step)
    with pytest.raises(ConfigError, match=message):
        captured(dataclasses.replace(views, **{field: change(getattr(views, field))}), LR, EMA)
    assert changed(before, everything(step)) == []


def test_a_refused_capture_says_why_and_what_to_do() -> None:
    step, views = make_step(), batches(1)[0]
    before = everything(step)
    refusal = RuntimeError("operation not permitted when stream is capturing\nCompile with `TORCH_USE_CUDA_DSA`")
    with pytest.raises(
        ConfigError, match=r"\(operation not permitted when stream is capturing\): use --cuda-graph off"
    ):
        GraphedStep(step, views, Recorder(refusal))
    assert changed(before, everything(step)) == []
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        GraphedStep(step, views, Recorder(torch.OutOfMemoryError("tried to allocate 2 GiB")))


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU, and the device is cpu: use --cuda-graph off"):
        GraphedStep(make_step(), batches(1)[0])


GPU_MODES = [
    ("torch", "off", torch.float32),
    ("torch", "off", torch.float16),
    ("triton", "off", torch.float32),
    ("triton", "off", torch.bfloat16),
    ("triton", "default", torch.bfloat16),
    ("torch", "max-autotune", torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "compile", "dtype"), GPU_MODES)
def test_a_cuda_graph_follows_the_eager_step(kernels: str, compile: str, dtype: torch.dtype) -> None:
    """Early steps to the precision of the type; after 100, the same loss, queue pointer and counts."""
    options = {"device": "cuda", "dtype": dtype, "symmetric": True, "bn_splits": 4}
    eager, captured = make_step(**options), make_step(**options, kernels=kernels, compile=compile)
    views = batches(4, "cuda")
    before = everything(captured)
    step = GraphedStep(captured, views[0])
    assert changed(before, everything(captured)) == []
    close = 1e-4 if dtype == torch.float32 else 0.03
    for number in range(100):
        if number == 1:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            eager(views[number % 4], LR, EMA)
            step(views[number % 4], LR, EMA)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if number == 0:
            torch.testing.assert_close(captured.dictionary.keys, eager.dictionary.keys, rtol=close, atol=close)
            torch.testing.assert_close(captured.query.buffers, eager.query.buffers, rtol=close, atol=close)
            first, wanted = captured.read_metrics(), eager.read_metrics()
            assert first["skipped_steps"] == wanted["skipped_steps"]
            if not wanted["skipped_steps"]:
                assert first["loss"] == pytest.approx(wanted["loss"], rel=close)
    found, wanted = captured.read_metrics(), eager.read_metrics()
    assert found["steps"] == wanted["steps"] == 99
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.05)
    if dtype != torch.float16:  # two trajectories of float16 may skip different steps
        assert captured.dictionary.pointer.item() == eager.dictionary.pointer.item()
        assert torch.nn.functional.cosine_similarity(captured.dictionary.keys, eager.dictionary.keys).mean() > 0.95
    assert captured.query.is_intact()
    assert captured.key.is_intact()


@pytest.mark.gpu
def test_a_cuda_graph_skips_a_bad_batch_and_goes_on() -> None:
    captured = make_step(device="cuda", dtype=torch.bfloat16, kernels="triton", bn_splits=4)
    good, bad = batches(2, "cuda")
    bad.query[0, 0, 0, 0] = float("nan")
    step = GraphedStep(captured, good)
    step(good, LR, EMA)
    before = whole_state(captured)
    step(bad, LR, EMA)
    assert changed(before, whole_state(captured)) == []
    step(good, LR, EMA)
    metrics = captured.read_metrics()
    assert (metrics["steps"], metrics["skipped_steps"], metrics["consecutive_skipped"]) == (3, 1, 0)
    assert "queue.pointer" in changed(before, whole_state(captured))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_activations_are_computed_again_inside_a_cuda_graph(kernels: str) -> None:
    steps = [make_step(device="cuda", kernels=kernels, bn_splits=4, checkpoint_activations=c) for c in (False, True)]
    views = batches(2, "cuda")
    for step in steps:
        captured = GraphedStep(step, views[0])
        for batch in views:
            captured(batch, LR, EMA)
    torch.testing.assert_close(steps[0].query.buffers, steps[1].query.buffers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps[0].dictionary.keys, steps[1].dictionary.keys, rtol=1e-3, atol=1e-3)
