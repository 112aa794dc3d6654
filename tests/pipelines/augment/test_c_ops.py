"""The compiled colours against those in torch: the same bits, whatever the crops, parameters and threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.augment import c_ops, torch_ops
from pipelines.augment.params import ORDERS, Column, Op, sample_params
from pipelines.augment.presets import BYOL, CIFAR, PRESETS, V1, V2, Augmentation
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.c_library import NoLibraryError
from pipelines.plan.planner import Planner
from pipelines.views import BatchPlan, Crops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TURNED = replace(V2, name="turned", flip_p=0.3, vertical_flip_p=0.5, mean=(0.1, 0.5, 0.9), std=(1.0, 0.2, 0.1))
WIDE = replace(V2, name="wide blur", blur_p=0.9, blur_sigma=(0.1, 5.0), solarise_p=0.5)
PLAIN = replace(V1, name="plain", jitter_p=0.0, grey_p=0.0)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found, reason = c_ops.loop()
    if found is None:
        pytest.skip(reason)
    return found


def random_crops(count: int, side: int) -> Tensor:
    """Noise, a row of pure colours, a row of greys, and one of two equal channels."""
    pixels = np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    corners = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    pixels[:, 0] = np.resize(corners, (side, 3))
    pixels[:, 1:2, :, 1:] = pixels[:, 1:2, :, :1]
    pixels[:, 2:3, :, 1] = pixels[:, 2:3, :, 0]
    return torch.from_numpy(pixels)


def random_params(count: int, augmentation: Augmentation, seed: int = 0) -> np.ndarray:
    rows = sample_params(seed, 0, np.arange(count), augmentation)[0]
    rows[:, Column.ORDER] = np.resize(ORDERS, count)
    return rows


def assert_same_bits(
    library: ctypes.CDLL, crops: Tensor, params: np.ndarray, augmentation: Augmentation, dtype: torch.dtype
) -> None:
    actual = c_ops.apply_by(library, crops, params, augmentation, dtype)
    expected = torch_ops.apply(crops, params, augmentation, dtype)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(expected).any()
    different = (actual != expected).flatten(1).any(1).nonzero().flatten()
    assert not len(different), (different.tolist(), (actual.float() - expected.float()).abs().max())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("augmentation", [*PRESETS, TURNED, WIDE, PLAIN], ids=lambda a: a.name)
def test_every_recipe_and_dtype(library: ctypes.CDLL, augmentation: Augmentation, dtype: torch.dtype) -> None:
    for count, side in ((48, 16), (24, 33)):
        assert_same_bits(library, random_crops(count, side), random_params(count, augmentation), augmentation, dtype)


@pytest.mark.parametrize(("count", "side"), [(6, 1), (30, 2), (30, 3), (30, 7), (24, 17), (5, 70), (3, 224), (2, 1031)])
def test_ragged_sizes(library: ctypes.CDLL, count: int, side: int) -> None:
    """From one pixel to rows of more than a tile; 3 pixels have a blur of 5 taps."""
    params = random_params(count, TURNED)
    params[1, Column.BLUR_SIGMA] = 1.9
    assert_same_bits(library, random_crops(count, side), params, TURNED, torch.bfloat16)


@pytest.mark.parametrize("augmentation", [V1, V2], ids=lambda a: a.name)
def test_extreme_parameters(library: ctypes.CDLL, augmentation: Augmentation) -> None:
    """Every combination of the limits that the command line allows, in every order that two operations can have."""
    factors = [0.0, 1.0, 1e-3, 3.0]
    hues = [-0.5, 0.0, 1e-6, 0.25, 0.5]
    grid = np.array(np.meshgrid(factors, factors, factors, hues), dtype=np.float32).reshape(4, -1).T
    params = random_params(len(grid), augmentation)
    params[:, Column.BRIGHTNESS : Column.GREY] = grid
    params[:, Column.BLUR_SIGMA] = np.resize([0, 0.05, 0.1, 0.2, 2, 100], len(grid))
    params[:, Column.SOLARISE] = np.arange(len(grid)) % 2
    assert_same_bits(library, random_crops(len(grid), 9), params, augmentation, torch.float32)


@pytest.mark.parametrize("std", [1e-6, 1e-3, 50.0, 1e4], ids=lambda std: f"std {std:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_from_denormal_to_infinite(library: ctypes.CDLL, dtype: torch.dtype, std: float) -> None:
    strange = replace(CIFAR, mean=(0.0, 0.5, 1.0), std=(std, std, std))
    assert_same_bits(library, random_crops(24, 12), random_params(24, strange), strange, dtype)


@pytest.mark.parametrize("layout", ["HWC", "HCW", "CHW", "every other column"])
def test_crops_of_any_strides(library: ctypes.CDLL, layout: str) -> None:
    crops, params = random_crops(6, 12), random_params(6, TURNED)
    axes = {"HCW": (0, 1, 3, 2), "CHW": (0, 2, 3, 1)}.get(layout, (0, 1, 2, 3))
    back = {"HCW": (0, 1, 3, 2), "CHW": (0, 3, 1, 2)}.get(layout, (0, 1, 2, 3))
    strided = crops.permute(*back).contiguous().permute(*axes)
    if layout == "every other column":
        strided = torch.empty(6, 12, 24, 3, dtype=torch.uint8)[:, :, ::2].copy_(crops)
    assert torch.equal(strided, crops)
    before = crops.clone()
    expected = torch_ops.apply(crops, params, TURNED, torch.float32)
    assert torch.equal(c_ops.apply_by(library, strided, params, TURNED, torch.float32), expected)
    assert torch.equal(crops, before)


def test_source_and_an_earlier_result(library: ctypes.CDLL) -> None:
    crops, params = random_crops(5, 9), random_params(8, BYOL)
    source = np.array([4, 4, 0, 2, 1, 3, 0, 0])
    out = torch.full((8, 9, 9, 3), torch.nan).permute(0, 3, 1, 2)
    actual = c_ops.apply_by(library, crops, params, BYOL, torch.float32, source, out)
    assert actual.data_ptr() == out.data_ptr()
    assert torch.equal(out, torch_ops.apply(crops, params, BYOL, torch.float32, source))
    with pytest.raises(AssertionError):
        c_ops.apply_by(library, crops, params, BYOL, torch.float32, source + 1)


def test_any_order_of_operations(library: ctypes.CDLL) -> None:
    """Also those that `sample_params` never draws: an operation several times, and no contrast."""
    contrasts = sum((np.arange(256) >> shift & 3) == Op.CONTRAST for shift in (0, 2, 4, 6))
    orders = np.flatnonzero(contrasts <= 1)
    params = random_params(len(orders), V1)
    params[:, Column.ORDER] = orders
    assert_same_bits(library, random_crops(len(orders), 5), params, V1, torch.float32)
    params[:, Column.BRIGHTNESS : Column.HUE], params[:, Column.HUE] = 1, 0
    assert_same_bits(library, random_crops(len(orders), 5), params, V1, torch.float32)


def test_no_views(library: ctypes.CDLL) -> None:
    crops, params = random_crops(1, 9)[:0], random_params(1, V2)[:0]
    assert c_ops.apply_by(library, crops, params, V2, torch.bfloat16).shape == (0, 3, 9, 9)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_bits_depend_neither_on_threads_nor_on_the_batch(library: ctypes.CDLL) -> None:
    """Compiled or not: several tasks of views, and views alone."""
    crops, params = random_crops(60, 40), random_params(60, V2)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(c_ops.apply_by(library, crops, params, V2, torch.float32))
        results.append(torch_ops.apply(crops, params, V2, torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)
    for row in (0, 31, 59):
        for apply in (torch_ops.apply, c_ops.apply):
            alone = apply(crops[row : row + 1], params[row : row + 1], V2, torch.float32)
            assert torch.equal(alone[0], results[0][row])


class RandomCrops:
    """A crop source without images."""

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        for plan in plans:
            yield Crops(random_crops(2 * len(plan.indices), 16).view(2, -1, 16, 16, 3), plan)

    def close(self) -> None:
        """Nothing to release."""


def test_a_pipeline_gives_the_same_views_compiled_or_not(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed where no compiler is goes on with the same bits."""
    planner = Planner(np.full((40, 2), 64), seed=3, batch_size=20, augmentation=V2, shuffle_keys=True)
    pipeline = TwoViewPipeline(planner, RandomCrops(), torch.device("cpu"), torch.bfloat16)
    compiled = [view.clone() for views in pipeline.views(0, 3) for view in (views.query, views.key)]
    calls = []

    def by_torch(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return torch_ops.apply(*arguments)

    monkeypatch.setattr(c_ops, "apply", by_torch)
    plain = [view for views in pipeline.views(0, 3) for view in (views.query, views.key)]
    assert len(calls) == 3
    assert all(torch.equal(*pair) for pair in zip(compiled, plain, strict=True))


# ---- without the loop ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiler(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    c_ops.loop.cache_clear()
    yield
    c_ops.loop.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_torch_does_the_work_without_a_compiler() -> None:
    assert c_ops.loop().library is None
    assert c_ops.loop().reason == "no C compiler was found (cc, gcc, clang)"
    crops, params = random_crops(6, 12), random_params(6, V2)
    expected = torch_ops.apply(crops, params, V2, torch.bfloat16)
    assert torch.equal(c_ops.apply(crops, params, V2, torch.bfloat16), expected)


def test_other_dtypes_are_left_to_torch() -> None:
    crops, params = random_crops(6, 12), random_params(6, V2)
    assert torch.equal(c_ops.apply(crops, params, V2, torch.float64), torch_ops.apply(crops, params, V2, torch.float64))


@pytest.mark.parametrize("row", [0, 13])
def test_a_library_with_one_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    def nearly(library: object, *arguments: object) -> Tensor:
        views = torch_ops.apply(*arguments)  # type: ignore[arg-type]
        views[row, 1, 3, 4] += 1e-2
        return views

    monkeypatch.setattr(c_ops, "apply_by", torch_ops_apply := lambda library, *rest: torch_ops.apply(*rest))
    c_ops.check(torch_ops_apply)  # type: ignore[arg-type]
    monkeypatch.setattr(c_ops, "apply_by", nearly)
    with pytest.raises(NoLibraryError, match="bits"):
        c_ops.check(nearly)  # type: ignore[arg-type]
