"""The order of an epoch: every image once, shuffled, and with local reads for archives."""

import numpy as np
import pytest

from pipelines.augment.presets import AUGMENTATIONS
from pipelines.data.index import ImageIndex, PackedRecords
from pipelines.errors import DataError
from pipelines.plan.order import archive_order, epoch_order, orders
from pipelines.plan.planner import Planner

ARCHIVES = np.repeat(np.arange(40), 100)


@pytest.mark.parametrize("buffer", [0, 1, 300, 10**6])
def test_every_image_comes_once(buffer: int) -> None:
    order = archive_order(1, 0, ARCHIVES, buffer)
    assert np.array_equal(np.sort(order), np.arange(4000))


def test_without_a_buffer_each_archive_is_read_sequentially_in_random_order_of_archives() -> None:
    files = ARCHIVES[archive_order(1, 0, ARCHIVES, 0)]
    starts = np.flatnonzero(np.diff(files, prepend=-1))
    assert len(starts) == 40, "each archive is contiguous"
    assert not np.array_equal(files[starts], np.arange(40))


def test_an_image_moves_less_than_the_buffer() -> None:
    unmixed, mixed = archive_order(1, 0, ARCHIVES, 0), archive_order(1, 0, ARCHIVES, 300)
    before, after = np.argsort(unmixed), np.argsort(mixed)
    assert 120 < np.abs(before - after).max() < 300
    assert np.corrcoef(before, after)[0, 1] < 0.9999
    # A step reads from few archives, but from more than one, so that it mixes their classes.
    archives = [len(np.unique(ARCHIVES[mixed[start : start + 100]])) for start in range(0, 4000, 100)]
    assert 3 <= np.mean(archives) <= 6


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [archive_order(seed, epoch, ARCHIVES, 300) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert np.array_equal(orders[0], archive_order(1, 0, ARCHIVES, 300))
    assert all((a != b).mean() > 0.9 for i, a in enumerate(orders) for b in orders[:i])


def test_a_planner_starts_at_any_step_of_it() -> None:
    sizes = np.full((4000, 2), 8, dtype=np.int32)
    planner = Planner(
        sizes,
        seed=1,
        batch_size=32,
        augmentation=AUGMENTATIONS["v1"],
        shuffle_keys=False,
        order=lambda epoch: archive_order(1, epoch, ARCHIVES, 300),
    )
    assert np.array_equal(planner.plan(130).indices, archive_order(1, 1, ARCHIVES, 300)[5 * 32 : 6 * 32])


def test_the_order_is_chosen_by_name() -> None:
    count = len(ARCHIVES)
    zeros = np.zeros(count, dtype=np.int64)
    names = tuple(str(i) for i in range(count))
    records = PackedRecords(("a.tar",) * 40, ARCHIVES.astype(np.int32), zeros, zeros, zeros.astype(bool), names)
    index = ImageIndex("x", np.full((count, 2), 8, dtype=np.int32), records=records)
    assert np.array_equal(orders("archives", index, 1, 300)(2), archive_order(1, 2, ARCHIVES, 300))
    assert np.array_equal(orders("any", index, 1, 300)(2), epoch_order(1, 2, count))
    loose = ImageIndex.from_pixels("y", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="--order archives is for tar archives"):
        orders("archives", loose, 1, 300)
