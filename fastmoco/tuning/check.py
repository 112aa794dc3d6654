"""Comparison of a fast path with plain PyTorch: one step from the same state, on the first batch of the run.

The reference is eager float32 without our kernels. How far a correct implementation may be from it depends on the
network: an untrained ResNet-50 maps all images to nearly the same features, and its bfloat16 gradient has no digit in
common with the float32 one. So tolerances are measured: FACTOR times the error of plain PyTorch in the same number
format, which for float32 is the effect of a change of every weight by one unit in the last place.

Our Triton kernels are compared in float32 too, where an error of theirs is not hidden by rounding.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES, out_of_memory
from fastmoco.distributed.world import World
from fastmoco.errors import BackendMissingError, DeviceError
from fastmoco.run.state import build_train_step
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from fastmoco.tuning.candidates import Candidate
from fastmoco.tuning.compare import StepResult, perturb, relative_errors, run_step
from pipelines.errors import DataError
from pipelines.views import Views

FACTOR = 4.0
FLOORS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # smallest tolerances
LIMIT = 0.5  # of loss, keys and statistics in any format; the gradient has none, see above
MEAN_DISTANCE, FAR, FAR_SHARE = 0.02, 0.2, 0.01  # of views: mean, and how few pixels may be far apart
_WEIGHTS = ("gradient", "query", "key")  # groups whose error is that of the gradient
CPU_IMAGES = 32  # on a CPU a part of the batch is enough, and a float32 step takes seconds


@dataclass(frozen=True)
class Verdict:
    """failure  why the candidate cannot be used, in one line; None if it is right
    errors   relative errors by tensor, at the number format of the candidate"""

    failure: str | None
    errors: dict[str, float]

    def __str__(self) -> str:
        """The errors of loss, keys and statistics. The gradient's is that of the number format, and says little."""
        worst: dict[str, float] = {}
        for name, error in self.errors.items():
            group = name.split(" ", 1)[0]
            worst[group] = max(worst.get(group, 0.0), error)
        return ", ".join(f"{group} {_percent(error)}" for group, error in worst.items() if group not in _WEIGHTS)


class Checker:
    """Compares candidates with plain PyTorch.

    config  the run; what a candidate defines is taken from the candidate
    views   the first batch of the run on the device, float32, on one rank (B, or a rank's B/R images)
    images  number of images of the data set, for the memory bank
    graph   captures a step
    """

    def __init__(
        self,
        config: ResolvedConfig,
        views: Views,
        images: int,
        device: torch.device,
        graph: Callable[[TrainStep, Views], GraphedStep] = GraphedStep,
    ) -> None:
        self._config, self._images, self._device, self._graph = config, images, device, graph
        self._full = views
        self._smallest = 2 * config.model.bn_splits
        self._count = len(views.query)
        if device.type == "cpu":
            self._count = min(self._count, max(self._smallest, CPU_IMAGES // self._smallest * self._smallest))
        self._references: dict[str, StepResult] = {}
        self._verdicts: dict[Candidate, Verdict] = {}  # of steps that are not captured

    @property
    def images(self) -> int:
        """Images of the batch that are compared: fewer than all where the reference needs too much memory."""
        return self._count

    def check(self, candidate: Candidate) -> Verdict:
        """Raises DeviceError if the candidate left the device unusable, or not even a small reference fits."""
        try:
            return self._check(candidate)
        except (KeyboardInterrupt, DataError, DeviceError):
            raise
        except Exception as error:
            failure = _reason(error)
        self._check_device(candidate, failure)
        return Verdict(failure, {})

    def _check(self, candidate: Candidate) -> Verdict:
        if candidate.kernels != "torch" and candidate.amp != "fp32":
            exact = self._compare(Candidate(amp="fp32", kernels=candidate.kernels))
            if exact.failure is not None:
                return Verdict(f"in float32, {exact.failure}", exact.errors)
        verdict = self._compare(replace(candidate.arithmetic, cuda_graph="off"))
        if verdict.failure is None and candidate.cuda_graph == "on":
            failure = self._check_graph(candidate, verdict)
            return Verdict(failure, verdict.errors)
        return verdict

    def _compare(self, candidate: Candidate) -> Verdict:
        """Compare a step that is not captured, once for each candidate."""
        if candidate not in self._verdicts:
            reference = self._reference()
            errors = relative_errors(self._run(candidate), reference)
            failure = _failure(errors, self._tolerances(candidate, reference))
            self._verdicts[candidate] = Verdict(failure, errors)
        return self._verdicts[candidate]

    def _tolerances(self, candidate: Candidate, reference: StepResult) -> dict[str, float]:
        """The largest relative error of each tensor."""
        plain = Candidate(amp=candidate.amp)
        if candidate.amp != "fp32" and replace(candidate.arithmetic, cuda_graph="off") == plain:
            return {
                f"{group} {name}".strip(): math.inf if group in _WEIGHTS else LIMIT
                for group, tensors in reference.after.items()
                for name in tensors
            }
        noise = self._references.get(f"noise {candidate.amp}")
        if noise is None:
            noise = self._run(plain, perturbed=candidate.amp == "fp32")
            self._references[f"noise {candidate.amp}"] = noise
        floor, errors = FLOORS[candidate.amp], relative_errors(noise, reference)
        return {
            name: min(max(floor, FACTOR * error), math.inf if name.split(" ", 1)[0] in _WEIGHTS else LIMIT)
            for name, error in errors.items()
        }

    def _check_graph(self, candidate: Candidate, verdict: Verdict) -> str | None:
        """Why the step cannot be captured, or what differs in its replay."""
        step = self._build(candidate, len(self._full.query))
        views = _cast(self._full, candidate.amp)
        try:
            eager = run_step(step, views, self._config.optim.lr)
            replayed = run_step(step, views, self._config.optim.lr, self._graph(step, views))
            noise = {name: max(FLOORS[candidate.amp], FACTOR * error) for name, error in verdict.errors.items()}
            return _failure(relative_errors(replayed, eager), noise)
        finally:
            del step
            self._release()

    def _reference(self) -> StepResult:
        """Eager float32, on as many images as fit the memory."""
        while "fp32" not in self._references:
            try:
                self._references["fp32"] = self._run(Candidate(amp="fp32"))
            except torch.OutOfMemoryError as error:
                if self._count <= self._smallest:
                    batch, splits = self._config.optim.batch_size, self._config.model.bn_splits
                    raise out_of_memory(self._device, batch, splits) from error
                self._release()
                self._count = max(self._smallest, self._count // 2 // self._smallest * self._smallest)
        return self._references["fp32"]

    def _run(self, candidate: Candidate, *, perturbed: bool = False) -> StepResult:
        step = self._build(candidate, self._count)
        try:
            if perturbed:
                perturb(step)
            with _exact_float32() if candidate.amp == "fp32" else contextlib.nullcontext():
                return run_step(
                    step, _cast(first_images(self._full, self._count), candidate.amp), self._config.optim.lr
                )
        finally:
            del step
            self._release()

    def _build(self, candidate: Candidate, count: int) -> TrainStep:
        return build_for(candidate, self._config, count, self._images, self._device)

    def _release(self) -> None:
        """Return the memory of a step that is no longer used to the device."""
        gc.collect()
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of an earlier error, which is reported by `_check_device`
                torch.cuda.empty_cache()

    def _check_device(self, candidate: Candidate, failure: str) -> None:
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as error:
                raise DeviceError(
                    f"{candidate} left the device unusable ({failure}): start again with --kernels torch --cuda-graph "
                    "off --check off"
                ) from error


def build_for(candidate: Candidate, config: ResolvedConfig, count: int, images: int, device: torch.device) -> TrainStep:
    """The initial step of a run as one rank computes it on its own, for batches of `count` images."""
    local: dict[str, int] = {"batch_size": count}
    if config.model.mechanism == "end-to-end":
        local["moco_k"] = count
    return build_train_step(ResolvedConfig.of(candidate.apply(config).replace(**local)), World(device), images)


def views_failure(fused: Callable[[], Views], reference: Views) -> str | None:
    """Why views made by Triton kernels cannot be used: an error, or a difference from those made by torch, in units of
    the normalised views. A crop that was rounded to uint8 differs by up to 0.02."""
    try:
        views = fused()
        distances = torch.stack([(views.query - reference.query).abs(), (views.key - reference.key).abs()])
        mean, far = float(distances.mean()), float((distances > FAR).float().mean())
    except (DataError, KeyboardInterrupt):
        raise
    except Exception as error:
        return _reason(error)
    if mean <= MEAN_DISTANCE and far <= FAR_SHARE:
        return None
    return f"views differ by {mean:.3f} on average from those of torch, expected at most {MEAN_DISTANCE}"


def first_images(views: Views, count: int) -> Views:
    """The pairs of the first `count` images, with their keys in the order in which they are in the key batch."""
    if count == len(views.query):
        return views
    rows = torch.nonzero(views.key_order < count).flatten()
    layout = torch.channels_last
    query = views.query[:count].contiguous(memory_format=layout)
    key = views.key[rows].contiguous(memory_format=layout)
    return Views(query, key, views.key_order[rows], views.index[:count])


def _cast(views: Views, amp: str) -> Views:
    dtype = DTYPES[amp]
    return Views(views.query.to(dtype), views.key.to(dtype), views.key_order, views.index)


def _failure(errors: dict[str, float], tolerances: dict[str, float]) -> str | None:
    """The tensor that exceeds its tolerance most, as text; None if none does."""
    excess = {name: error / tolerances[name] for name, error in errors.items() if tolerances[name] < math.inf}
    name = max(excess, key=excess.__getitem__)
    if excess[name] <= 1:
        return None
    return (
        f"{name} differs by {_percent(errors[name])} from plain PyTorch, and at most {_percent(tolerances[name])} is "
        "rounding"
    )


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Without TF32, which has the precision of float16."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _reason(error: Exception) -> str:
    """The cause of a failure in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        text
        if isinstance(error, (ArithmeticError, BackendMissingError, ValueError))
        else (f"{type(error).__name__}: {text}")
    )
