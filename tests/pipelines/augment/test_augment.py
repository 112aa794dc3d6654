"""Every augmentation against torchvision's functional operation on the same parameters, one image at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from pipelines.augment import torch_ops
from pipelines.augment.params import ORDERS, Column, Op, blur_taps, sample_params
from pipelines.augment.presets import BYOL, CIFAR, V1, V2, Augmentation
from pipelines.augment.torch_ops import apply

SOLARISING = replace(V2, name="solarising", solarise_p=0.5, blur_p=0.6)
TURNED = replace(V2, name="turned", flip_p=0.3, vertical_flip_p=0.5)
RECIPES = [V1, V2, CIFAR, SOLARISING, TURNED]
JITTER = {
    Op.BRIGHTNESS: (torch_ops.adjust_brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0]),
    Op.CONTRAST: (torch_ops.adjust_contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 3.0]),
    Op.SATURATION: (torch_ops.adjust_saturation, TF.adjust_saturation, [0.0, 0.6, 1.0, 1.4, 3.0]),
    Op.HUE: (torch_ops.adjust_hue, TF.adjust_hue, [-0.5, -0.4, -0.1, 0.0, 1e-3, 0.25, 0.5]),
}


def crops_of(count: int, side: int, seed: int = 0) -> Tensor:
    """(count, S, S, 3) uint8: noise, and rows of pure colours and of greys, where hue and saturation have edges."""
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    corners = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8)
    images[:, 0] = corners[torch.arange(side) % 8]
    images[:, 1] = torch.linspace(0, 255, side).to(torch.uint8)[:, None]
    images[:, 2, :, 1] = images[:, 2, :, 0]
    return images


def planar(crops: Tensor) -> Tensor:
    return crops.permute(0, 3, 1, 2).float().div(255).contiguous()


def neutral(count: int) -> np.ndarray:
    """Rows that leave an image unchanged."""
    rows = np.zeros((count, len(Column)), dtype=np.float32)
    rows[:, Column.ORDER] = ORDERS[0]
    rows[:, Column.BRIGHTNESS : Column.HUE] = 1
    return rows


def colour(images: Tensor, rows: np.ndarray, augmentation: Augmentation) -> None:
    """`torch_ops.colour` of views that are one group."""
    (group,), _ = torch_ops.groups_on_device(rows, np.arange(len(rows)), len(rows), torch.device("cpu"))
    assert torch.equal(group.rows, torch.arange(len(rows)))
    torch_ops.colour(images, group, augmentation)


def reference(crop: Tensor, row: np.ndarray, augmentation: Augmentation) -> Tensor:
    """One (S, S, 3) uint8 crop through torchvision's functionals: (3, S, S) float32, normalised."""
    image = crop.permute(2, 0, 1).float() / 255
    grey = bool(row[Column.GREY])
    if grey and augmentation.grey_first:
        image = TF.rgb_to_grayscale(image, 3)
    order = int(row[Column.ORDER])
    for position in range(4):
        op = Op((order >> 2 * position) & 3)
        image = JITTER[op][1](image, float(row[Column.BRIGHTNESS + op]))
    if grey and not augmentation.grey_first:
        image = TF.rgb_to_grayscale(image, 3)
    sigma = float(row[Column.BLUR_SIGMA])
    if sigma > 0:
        taps = blur_taps(augmentation, image.shape[-1])
        image = TF.gaussian_blur(image, [taps, taps], [sigma, sigma])
    if row[Column.SOLARISE]:
        image = TF.solarize(image, 0.5)
    if row[Column.FLIP]:
        image = TF.horizontal_flip(image)
    if row[Column.VERTICAL_FLIP]:
        image = TF.vertical_flip(image)
    return TF.normalize(image, list(augmentation.mean), list(augmentation.std))


def assert_near(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- one operation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name.lower())
def test_jitter_operations_equal_torchvision(op: Op) -> None:
    ours, torchvisions, factors = JITTER[op]
    images = planar(crops_of(len(factors), 16))
    expected = torch.stack([torchvisions(image, factor) for image, factor in zip(images, factors, strict=True)])
    actual = ours(images.clone(), torch.tensor(factors).view(-1, 1, 1, 1))
    assert_near(actual, expected, 2e-6)


def test_grey_equals_torchvision() -> None:
    images, rows = planar(crops_of(4, 16)), neutral(4)
    expected = images.clone()
    expected[[1, 3]] = TF.rgb_to_grayscale(images[[1, 3]], 3)
    rows[[1, 3], Column.GREY] = 1
    colour(images, rows, V2)
    assert_near(images, expected, 1e-6)


@pytest.mark.parametrize("side", [8, 17, 40, 53, 96])
def test_blur_equals_torchvision(side: int) -> None:
    """One sigma per view, as many taps as fit, reflection at the border; the GPU's and the CPU's implementation."""
    images, sigmas = planar(crops_of(4, side)), [0.1, 0.7, 1.3, 2.0]
    taps = blur_taps(V2, side)
    assert taps == min(15, 2 * side - 1)
    expected = torch.stack([TF.gaussian_blur(i, [taps, taps], [s, s]) for i, s in zip(images, sigmas, strict=True)])
    assert_near(torch_ops.blur_grouped_conv(images, torch.tensor(sigmas), taps), expected, 2e-6)
    torch_ops.blur_sums(images, torch.arange(4), torch.tensor(sigmas), taps)
    assert_near(images, expected, 2e-6)


def test_solarise_equals_torchvision() -> None:
    images, rows = planar(crops_of(4, 16)), neutral(4)
    rows[[1, 3], Column.SOLARISE] = 1
    plain = images.clone()
    colour(images, rows, SOLARISING)
    assert torch.equal(images[[0, 2]], plain[[0, 2]])
    assert torch.equal(images[[1, 3]], TF.solarize(plain[[1, 3]], 0.5))


def test_flip_equals_torchvision() -> None:
    crops, rows = crops_of(4, 16), neutral(4)
    plain = apply(crops, rows, V2, torch.bfloat16)
    rows[[2, 3], Column.FLIP] = 1
    actual = apply(crops, rows, V2, torch.bfloat16)
    assert torch.equal(actual[:2], plain[:2])
    assert torch.equal(actual[2:], TF.horizontal_flip(plain[2:]))


def test_vertical_flip_equals_torchvision() -> None:
    crops, rows = crops_of(4, 17), neutral(4)
    plain = apply(crops, rows, V2, torch.bfloat16)
    rows[[1, 3], Column.VERTICAL_FLIP] = rows[3, Column.FLIP] = 1
    actual = apply(crops, rows, V2, torch.bfloat16)
    assert torch.equal(actual[[0, 2]], plain[[0, 2]])
    assert torch.equal(actual[1], TF.vertical_flip(plain[1]))
    assert torch.equal(actual[3], TF.vertical_flip(TF.horizontal_flip(plain[3])))


@pytest.mark.parametrize("order", ORDERS.tolist())
def test_every_order_of_the_jitter(order: int) -> None:
    crops, rows = crops_of(2, 9), neutral(2)
    rows[:, Column.ORDER] = order
    rows[:, Column.BRIGHTNESS : Column.GREY] = [[1.35, 0.7, 1.4, -0.3], [0.65, 1.4, 0.6, 0.09]]
    expected = torch.stack([reference(c, r, V2) for c, r in zip(crops, rows, strict=True)])
    assert_near(apply(crops, rows, V2, torch.float32), expected)


def test_all_24_orders_exist_and_matter() -> None:
    assert len(set(ORDERS.tolist())) == 24
    assert {tuple(sorted((order >> 2 * i) & 3 for i in range(4))) for order in ORDERS.tolist()} == {(0, 1, 2, 3)}
    crops, rows = crops_of(1, 9).repeat(24, 1, 1, 1), neutral(24)
    rows[:, Column.ORDER] = ORDERS
    rows[:, Column.BRIGHTNESS : Column.GREY] = [1.4, 0.6, 1.4, 0.4]
    views = apply(crops, rows, V1, torch.float32)
    assert len({view.numpy().tobytes() for view in views}) == 24


# ---- the whole chain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", RECIPES, ids=lambda a: a.name)
@pytest.mark.parametrize("side", [12, 33])
def test_apply_equals_torchvisions_transforms(augmentation: Augmentation, side: int) -> None:
    crops = crops_of(64, side)
    rows = sample_params(7, 2, np.arange(64), augmentation)[1]
    views = apply(crops, rows, augmentation, torch.float32)
    assert views.shape == (64, 3, side, side)
    assert views.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([reference(c, r, augmentation) for c, r in zip(crops, rows, strict=True)])
    assert_near(views, expected, 2e-5)  # in units of a standard deviation: 5e-6 of the range of a pixel


def test_a_view_does_not_depend_on_the_rest_of_its_batch() -> None:
    """Groups, and the limit on their bytes, must not affect the result."""
    crops, rows = crops_of(200, 40), sample_params(7, 0, np.arange(200), V2)[0]
    rows[:150, Column.ORDER] = ORDERS[3]  # at 40 pixels a group has 40 views
    batch = apply(crops, rows, V2, torch.float32)
    for i in (0, 39, 40, 149, 150, 199):
        assert_near(apply(crops[i : i + 1], rows[i : i + 1], V2, torch.float32)[0], batch[i], 1e-6)


def test_source_selects_the_crop_of_each_view() -> None:
    crops, rows = crops_of(5, 12), sample_params(1, 0, np.arange(8), V2)[0]
    source = np.array([4, 4, 0, 2, 1, 3, 0, 0])
    actual = apply(crops, rows, V2, torch.float32, source)
    assert_near(actual, apply(crops[source], rows, V2, torch.float32), 1e-6)


@pytest.mark.parametrize("layout", ["HCW", "every other column"])
def test_crops_of_any_strides(layout: str) -> None:
    crops, rows = crops_of(6, 12), sample_params(1, 0, np.arange(6), V2)[0]
    strided = torch.empty(12, 12, 3, 12, dtype=torch.uint8).permute(0, 1, 3, 2)[::2]
    if layout == "every other column":
        strided = torch.empty(6, 12, 24, 3, dtype=torch.uint8)[:, :, ::2]
    strided.copy_(crops)
    before = crops.clone()
    assert torch.equal(apply(strided, rows, V2, torch.float32), apply(crops, rows, V2, torch.float32))
    assert torch.equal(crops, before)


def test_a_view_without_colour_is_only_normalised() -> None:
    crops = crops_of(3, 12)
    expected = TF.normalize(planar(crops), list(V2.mean), list(V2.std))
    assert_near(apply(crops, neutral(3), V2, torch.float32), expected, 1e-6)


def test_jitter_does_not_change_other_views() -> None:
    """One jittered view between two without jitter, all with the same order."""
    crops, rows = crops_of(3, 12), neutral(3)
    rows[1, Column.SATURATION] = 1.3
    untouched = apply(crops, neutral(3), V2, torch.float32)
    actual = apply(crops, rows, V2, torch.float32)
    assert torch.equal(actual[[0, 2]], untouched[[0, 2]])
    assert not torch.equal(actual[1], untouched[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_training_dtype_is_the_rounded_float32(dtype: torch.dtype) -> None:
    crops, rows = crops_of(6, 12), sample_params(1, 0, np.arange(6), V2)[0]
    actual = apply(crops, rows, V2, dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual, apply(crops, rows, V2, torch.float32).to(dtype))


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", RECIPES, ids=lambda a: a.name)
def test_frequencies_and_ranges(augmentation: Augmentation) -> None:
    a, count = augmentation, 20_000
    rows = sample_params(0, 0, np.arange(count), a).reshape(2 * count, -1)
    assert rows.dtype == np.float32
    jittered = rows[:, Column.HUE] != 0
    shares = {
        Column.FLIP: (rows[:, Column.FLIP], a.flip_p),
        Column.GREY: (rows[:, Column.GREY], a.grey_p),
        Column.HUE: (jittered, a.jitter_p),
        Column.BLUR_SIGMA: (rows[:, Column.BLUR_SIGMA] > 0, a.blur_p),
        Column.SOLARISE: (rows[:, Column.SOLARISE], a.solarise_p),
        Column.VERTICAL_FLIP: (rows[:, Column.VERTICAL_FLIP], a.vertical_flip_p),
    }
    for column, (chosen, p) in shares.items():
        assert abs(chosen.mean() - p) <= 5 * math.sqrt(p * (1 - p) / (2 * count)) + 1e-4, column
    for column, strength in ((2, a.brightness), (3, a.contrast), (4, a.saturation)):
        assert (rows[~jittered, column] == 1).all()
        quartiles = np.quantile(rows[jittered, column], [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quartiles, 1 + strength * np.array([-1, -0.5, 0, 0.5, 1]), atol=0.03 * strength)
    quartiles = np.quantile(rows[jittered, Column.HUE], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quartiles, a.hue * np.array([-1, -0.5, 0, 0.5, 1]), atol=0.03 * a.hue)
    orders = np.array([np.mean(rows[:, Column.ORDER] == order) for order in ORDERS])
    assert orders.sum() == pytest.approx(1)
    np.testing.assert_allclose(orders, 1 / 24, atol=5 * math.sqrt(1 / 24 / (2 * count)))
    if a.blur_p:
        sigma = rows[rows[:, Column.BLUR_SIGMA] > 0, Column.BLUR_SIGMA]
        np.testing.assert_allclose(np.quantile(sigma, [0, 0.5, 1]), [0.1, 1.05, 2.0], atol=0.03)


def test_a_factor_is_never_negative() -> None:
    strong = replace(CIFAR, brightness=1.5, jitter_p=1.0)
    factors = sample_params(0, 0, np.arange(5000), strong)[..., Column.BRIGHTNESS]
    assert factors.min() >= 0
    assert np.quantile(factors, 0.5) == pytest.approx(1.25, abs=0.05)


def test_choices_are_independent() -> None:
    """Flips, grey, jitter, blur, solarise, and the two views: no correlation above five standard deviations."""
    rows = sample_params(0, 0, np.arange(20_000), replace(SOLARISING, vertical_flip_p=0.5))
    columns = [Column.FLIP, Column.GREY, Column.HUE, Column.BLUR_SIGMA, Column.SOLARISE, Column.VERTICAL_FLIP]
    chosen = np.concatenate([rows[view][:, columns].T != 0 for view in (0, 1)]).astype(float)
    assert np.abs(np.corrcoef(chosen) - np.eye(12)).max() < 5 / math.sqrt(20_000)


def test_rows_depend_on_seed_epoch_sample_and_view_alone() -> None:
    rows = sample_params(3, 4, np.array([10, 11, 12]), V2)
    np.testing.assert_array_equal(sample_params(3, 4, np.array([12]), V2), rows[:, 2:])
    for other in (sample_params(2, 4, np.array([12]), V2), sample_params(3, 5, np.array([12]), V2), rows[::-1, 2:]):
        assert (other != rows[:, 2:]).any()


SWITCHES = {
    "flip_p": Column.FLIP,
    "vertical_flip_p": Column.VERTICAL_FLIP,
    "grey_p": Column.GREY,
    "blur_p": Column.BLUR_SIGMA,
    "solarise_p": Column.SOLARISE,
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_one_switch_changes_its_own_numbers_alone(switch: str, p: float) -> None:
    samples, full = np.arange(500), replace(SOLARISING, vertical_flip_p=0.6)
    before = sample_params(3, 1, samples, full)
    after = sample_params(3, 1, samples, replace(full, **{switch: p}))
    chosen, own = after[..., SWITCHES[switch]] != 0, before[..., SWITCHES[switch]] != 0
    assert abs(chosen.mean() - p) < 0.08
    assert (chosen <= own).all() or (chosen >= own).all(), "a smaller probability takes some of the same views"
    others = [column for column in Column if column != SWITCHES[switch]]
    np.testing.assert_array_equal(after[..., others], before[..., others])


def test_jitter_of_half_the_strength_moves_every_factor_half_as_far() -> None:
    samples = np.arange(200)
    half = replace(V2, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
    full, weak = sample_params(3, 1, samples, V2), sample_params(3, 1, samples, half)
    jitter = [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE]
    neutral_row = np.array([1, 1, 1, 0], dtype=np.float32)
    np.testing.assert_allclose(weak[..., jitter] - neutral_row, (full[..., jitter] - neutral_row) / 2, atol=1e-6)
    none = sample_params(3, 1, samples, replace(V2, jitter_p=0.0))
    assert (none[..., jitter] == neutral_row).all()
    others = [column for column in Column if column not in jitter]
    for rows in (weak, none):
        np.testing.assert_array_equal(rows[..., others], full[..., others])


def test_the_numbers_of_a_seed_stay_the_same() -> None:
    """A resumed run, and a run of an earlier version, see the views they would have seen."""
    row = sample_params(3, 4, np.array([10]), BYOL)[0, 0]
    expected = [1, 135, 1.3260149, 1.1211892, 0.9358627, -0.084118284, 0, 0, 0, 0]
    np.testing.assert_array_equal(row, np.array(expected, dtype=np.float32))
