"""Plans: a pure function of (seed, step), every image at most once per epoch, resumable at any step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment.params import Column
from pipelines.augment.presets import CIFAR, V2
from pipelines.plan.order import epoch_order, shard, steps_per_epoch
from pipelines.plan.planner import Planner, eval_plans
from pipelines.views import BatchPlan

FIELDS = ("step", "epoch", "indices", "boxes", "params", "key_order")


def sizes_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(8, 90, (count, 2)).astype(np.int32)


def planner_of(count: int, batch: int, *, seed: int = 1, shuffle: bool = True, **ranks: Any) -> Planner:
    return Planner(sizes_of(count), seed=seed, batch_size=batch, augmentation=V2, shuffle_keys=shuffle, **ranks)


def assert_same(a: BatchPlan, b: BatchPlan) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.data())
def test_a_plan_depends_on_its_step_alone(count: int, data: st.DataObject) -> None:
    """From any planner, in any order, from any starting step."""
    batch = data.draw(st.integers(2, count))
    step = data.draw(st.integers(0, 4 * (count // batch)))
    planner, other = planner_of(count, batch), planner_of(count, batch)
    list(other.plans(0, data.draw(st.integers(0, 5))))
    other.plan(step + 3)
    assert_same(planner.plan(step), other.plan(step))
    (resumed,) = other.plans(step, step + 1)
    assert_same(resumed, planner.plan(step))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.data())
def test_an_epoch_sees_every_image_at_most_once(count: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(2, count))
    epoch = data.draw(st.integers(0, 3))
    planner = planner_of(count, batch)
    assert planner.steps_per_epoch == count // batch
    first = epoch * planner.steps_per_epoch
    plans = list(planner.plans(first, first + planner.steps_per_epoch))
    seen = np.concatenate([plan.indices for plan in plans])
    assert len(seen) == len(set(seen.tolist())) == count // batch * batch
    assert seen.min() >= 0
    assert seen.max() < count
    assert {plan.epoch for plan in plans} == {epoch}
    assert [plan.step for plan in plans] == list(range(first, first + len(plans)))


def test_the_images_dropped_in_an_epoch_vary() -> None:
    """13 images in batches of 4: one is dropped every epoch, and not always the same."""
    planner = planner_of(13, 4)
    dropped = [set(range(13)) - set(np.concatenate([planner.indices(3 * e + i) for i in range(3)])) for e in range(20)]
    assert all(len(images) == 1 for images in dropped)
    assert len(set.union(*dropped)) > 5


def test_epochs_and_seeds_differ_in_everything() -> None:
    first, again = planner_of(40, 40).plan(0), planner_of(40, 40).plan(1)
    other = planner_of(40, 40, seed=2).plan(0)
    for plan in (again, other):
        assert (plan.indices != first.indices).any()
        assert (plan.key_order != first.key_order).any()
        by_image = (np.argsort(plan.indices), np.argsort(first.indices))
        for field in ("boxes", "params"):
            a, b = getattr(plan, field)[:, by_image[0]], getattr(first, field)[:, by_image[1]]
            assert (a != b).any(axis=-1).mean() > 0.8, field  # a tiny image has few possible boxes


def test_shapes_and_types() -> None:
    plan = planner_of(20, 6).plan(2)
    assert (plan.indices.shape, plan.indices.dtype) == ((6,), np.int64)
    assert (plan.boxes.shape, plan.boxes.dtype) == ((2, 6, 4), np.int32)
    assert (plan.params.shape, plan.params.dtype) == ((2, 6, len(Column)), np.float32)
    assert (plan.key_order.shape, plan.key_order.dtype) == ((6,), np.int64)


def test_boxes_fit_the_images_of_the_plan() -> None:
    planner = planner_of(30, 10)
    for plan in planner.plans(0, 6):
        sizes = planner.sizes[plan.indices]
        assert (plan.boxes[..., :2] + plan.boxes[..., 2:] <= sizes).all()


def test_key_order_is_a_new_permutation_each_step_or_the_identity() -> None:
    orders = [plan.key_order for plan in planner_of(64, 16).plans(0, 8)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(16))
    assert len({tuple(order.tolist()) for order in orders}) == 8
    for plan in planner_of(64, 16, shuffle=False).plans(0, 8):
        np.testing.assert_array_equal(plan.key_order, np.arange(16))


def test_the_batch_size_does_not_change_the_order() -> None:
    """Batches of 8 are pairs of batches of 4, in images and in crops."""
    small, large = planner_of(32, 4), planner_of(32, 8)
    for step in range(4):
        halves = [small.plan(2 * step), small.plan(2 * step + 1)]
        for field, axis in (("indices", 0), ("boxes", 1), ("params", 1)):
            joined = np.concatenate([getattr(half, field) for half in halves], axis=axis)
            np.testing.assert_array_equal(joined, getattr(large.plan(step), field))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_make_up_the_batch(ranks: int) -> None:
    plan = planner_of(40, 16).plan(1)
    shards = [shard(plan.indices, rank, ranks) for rank in range(ranks)]
    assert {len(indices) for indices in shards} == {16 // ranks}
    np.testing.assert_array_equal(np.concatenate(shards), plan.indices)
    rows = [shard(plan.indices[None].repeat(2, axis=0), rank, ranks) for rank in range(ranks)]
    assert rows[0].shape == (2, 16 // ranks)


def test_sharding_an_indivisible_batch_is_an_error() -> None:
    with pytest.raises(AssertionError, match="16 does not divide over 3"):
        shard(np.arange(16), 0, 3)


def test_a_planner_of_an_indivisible_batch_is_an_error() -> None:
    with pytest.raises(AssertionError, match="16 does not divide over 3"):
        planner_of(40, 16, rank=0, world_size=3)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_views_of_all_ranks_equal_those_of_one(ranks: int, shuffle: bool) -> None:
    """Row by row of the query batch and of the key batch: image, box and colour."""
    single = planner_of(40, 16, shuffle=shuffle).plan(3)
    plans = [planner_of(40, 16, shuffle=shuffle, rank=rank, world_size=ranks).plan(3) for rank in range(ranks)]

    def rows(plan: BatchPlan, field: str) -> list[np.ndarray]:
        """The query batch and the key batch in that field."""
        if field == "indices":
            values = np.tile(plan.indices, len(plan.boxes))
        else:
            values = getattr(plan, field).reshape(len(plan.boxes) * len(plan.indices), -1)
        return np.split(values[plan.rows], 2)

    for plan in plans:
        assert len(plan.rows) == 32 // ranks
        np.testing.assert_array_equal(plan.key_order, single.key_order)
    for field in ("indices", "boxes", "params"):
        for batch in (0, 1):
            actual = np.concatenate([rows(plan, field)[batch] for plan in plans])
            np.testing.assert_array_equal(actual, rows(single, field)[batch], err_msg=field)
    if shuffle:
        assert (rows(single, "indices")[1] == single.indices[single.key_order]).all()


def test_epoch_order_and_length() -> None:
    np.testing.assert_array_equal(np.sort(epoch_order(3, 2, 50)), np.arange(50))
    assert steps_per_epoch(50, 16) == 3
    assert steps_per_epoch(48, 16) == 3


# ---- evaluation ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 20), st.sampled_from([8, 32, 64, 65, 224]))
def test_evaluation_covers_every_position_once(count: int, batch: int, side: int) -> None:
    sizes = sizes_of(60)
    positions = np.random.default_rng(0).permutation(60)[:count]
    plans = list(eval_plans(sizes, positions, batch, side))
    np.testing.assert_array_equal(np.concatenate([plan.indices for plan in plans]), positions)
    assert all(len(plan.indices) == batch for plan in plans[:-1])
    for plan in plans:
        assert plan.boxes.shape == (1, len(plan.indices), 4)
        assert (plan.boxes[..., :2] >= 0).all()
        assert (plan.boxes[..., :2] + plan.boxes[..., 2:] <= sizes[plan.indices]).all()


def test_evaluation_crops_the_centre() -> None:
    """The largest square for small crops; the shorter side is resized to 256 for crops of 224 pixels."""
    sizes = np.array([[32, 32], [31, 48], [1, 1], [300, 256]], dtype=np.int32)
    (small,) = eval_plans(sizes, np.arange(4), 4, 32)
    assert small.boxes[0].tolist() == [[0, 0, 32, 32], [0, 8, 31, 31], [0, 0, 1, 1], [22, 0, 256, 256]]
    (large,) = eval_plans(sizes, np.arange(4), 4, 224)
    assert (small.shorter, large.shorter) == (0, 256)
    assert [next(eval_plans(sizes, np.arange(4), 4, side)).shorter for side in (64, 65, 96, 128)] == [0, 74, 110, 146]


def test_plans_of_a_recipe_use_its_scale() -> None:
    sizes = np.full((256, 2), 100, dtype=np.int32)
    plan = Planner(sizes, seed=0, batch_size=256, augmentation=CIFAR, shuffle_keys=False).plan(0)
    areas = plan.boxes[..., 2:].prod(axis=-1) / 1e4
    assert 0.07 < areas.min() < 0.12
    assert areas.max() > 0.85
