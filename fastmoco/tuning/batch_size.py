"""`--batch-size auto`: the largest batch whose training step fits into memory, measured before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.device import DTYPES
from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.evaluation.budget import is_out_of_memory
from fastmoco.run.batch_memory import BatchMemory
from fastmoco.tuning.candidates import Candidate
from fastmoco.tuning.capture import captured
from fastmoco.tuning.check import build_for
from fastmoco.tuning.timing import release
from pipelines.backends.two_view import BUFFERS
from pipelines.data.index import ImageIndex
from pipelines.data.resident_pixels import free_memory_bytes, resident_bytes
from pipelines.host_memory import peak_resident_bytes, reset_peak_resident
from pipelines.views import Views

UNIT = 16  # images of a device: its batch is a multiple
MOST = {"cuda": (4096, "SGD needs LARS with more (You et al. 2017)"), "cpu": (256, "a CPU is no faster with more")}
SHARE = {"cuda": 0.9, "cpu": 0.7}  # of free memory; the rest is for fragments, and on a CPU for other programs
FINE = 1 / 16  # the search ends when a batch larger by this share does not fit
_UNKNOWN = "--batch-size auto: this system does not tell how much memory a step takes on a CPU: give a number"
STEPS = 3  # the first ones allocate gradients, workspaces and the memory of the graph


def fit_batch(
    config: RunConfig, resolve: Callable[[RunConfig], ResolvedConfig], images: ImageIndex, world: World
) -> BatchMemory:
    """The largest batch of a run, of all devices together, that this rank's device has memory for.

    resolve  fills in what depends on the batch size

    Raises ConfigError if not even the smallest fits, or where a CPU's memory cannot be measured.
    """
    ranks, device = world.size, world.device

    def of(count: int) -> ResolvedConfig:
        return resolve(config.replace(batch_size=count * ranks))

    smallest = of(min(UNIT, max(2, len(images) // ranks)))
    if config.augment.mean is None and smallest.augment.mean is not None:  # of the images: measured once is enough
        config = config.replace(mean=smallest.augment.mean, std=smallest.augment.std)
    splits = smallest.model.bn_splits
    unit = math.lcm(UNIT, splits // math.gcd(splits, ranks))
    most, limit = min(_limits(smallest, len(images), ranks, device))
    most = most // unit * unit
    if most < unit:
        return BatchMemory(smallest.optim.batch_size, smallest.optim.batch_size // ranks, 0, {}, limit)
    free = free_memory_bytes(device)
    if smallest.data.pipeline == "resident":
        free -= resident_bytes(images)
    budget = int(SHARE[device.type] * free)
    count, curve = search(lambda count: step_bytes(of(count), count, len(images), device), unit, most, budget)
    return BatchMemory(count * ranks, count, budget, curve, limit if count == most else "")


def _limits(config: ResolvedConfig, images: int, ranks: int, device: torch.device) -> Iterator[tuple[int, str]]:
    """Largest batches of a device for other reasons than its memory, and these."""
    yield MOST[device.type]
    yield (images - 1) // ranks, f"there are {images:,} images"
    if config.model.mechanism == "queue":
        sides = 2 if config.model.symmetric else 1
        yield config.model.moco_k // sides // ranks, f"the queue has {config.model.moco_k:,} keys"


def search(measure: Callable[[int], int | None], unit: int, most: int, budget: int) -> tuple[int, dict[int, int]]:
    """The largest multiple of `unit` up to `most` that fits, to a share of FINE, and the bytes of all that were tried.

    measure  images → bytes, or None if they do not fit into memory at all

    Bytes are assumed to be affine in the images beyond the two largest that were measured. Raises ConfigError if `unit`
    does not fit.
    """
    curve: dict[int, int] = {}
    fits, too_large, count = 0, most + unit, unit
    while True:
        used = measure(count)
        if used is not None:
            curve[count] = used
        if used is not None and used <= budget:
            fits = count
        elif count == unit:
            raise ConfigError(
                f"--batch-size auto: not even {unit} images fit into {budget / 2**30:.1f} GiB of free memory: use "
                "--checkpoint-activations, a smaller --arch or --crop-size, or give --batch-size"
            )
        else:
            too_large = count
        if too_large - fits <= max(unit, FINE * fits):
            return fits, curve
        count = _next(curve, fits, too_large, unit, budget)


def _next(curve: dict[int, int], fits: int, too_large: int, unit: int, budget: int) -> int:
    """The next batch to try, between one that fits and one that does not: at most four times the former."""
    known = sorted(count for count in curve if count <= fits)[-2:]
    guess = 2 * fits
    if len(known) == 2:
        slope = (curve[known[1]] - curve[known[0]]) / (known[1] - known[0])
        guess = fits + int((budget - curve[fits]) / slope) if slope > 0 else 4 * fits
    guess = min(guess, 4 * fits) // unit * unit
    if guess >= too_large and too_large in curve:  # not affine: halve what is left
        guess = (fits + too_large) // 2 // unit * unit
    return min(max(guess, fits + unit), too_large - unit)


def step_bytes(config: ResolvedConfig, count: int, images: int, device: torch.device) -> int | None:
    """Peak memory of the first steps on `count` random images of one device, with its weights, queue and batches.

    None if they do not fit. Raises ConfigError on a CPU whose system does not tell the peak.
    """
    release(device)
    before = _reset_peak(device)
    try:
        _steps(config, count, images, device)
        return _peak(device) - before
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        release(device)


def _steps(config: ResolvedConfig, count: int, images: int, device: torch.device) -> None:
    step = build_for(Candidate.of(config), config, count, images, device)
    side, dtype = config.augment.crop_size, DTYPES[config.run.amp]
    channels = config.data.channels
    index = torch.arange(count, device=device)
    crops = torch.zeros(2, count, channels, side, side, dtype=torch.uint8, device=device)

    def images_of_a_view() -> torch.Tensor:
        layout = torch.channels_last
        return torch.randn(count, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=layout)

    buffers = BUFFERS if device.type == "cuda" and config.run.prefetch == "on" else 1
    batches = [Views(images_of_a_view(), images_of_a_view(), index, index) for _ in range(buffers)]
    call = step
    if config.run.cuda_graph == "on":
        call, _ = captured(step, batches[0], World(device), required=False)
    for _ in range(STEPS if device.type == "cuda" else 1):
        call(batches[0], 0.0, 1.0)
    del crops  # kept until here: it is part of a run's memory


def _reset_peak(device: torch.device) -> int:
    """Start counting, and return the bytes that are used now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    try:
        reset_peak_resident()
    except OSError:
        raise ConfigError(_UNKNOWN) from None
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    peak = peak_resident_bytes()
    if peak is None:
        raise ConfigError(_UNKNOWN)
    return peak
