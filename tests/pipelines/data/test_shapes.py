"""The shapes data set: deterministic, disjoint, balanced, and not solvable from raw pixels."""

import numpy as np
import pytest
import torch

from pipelines.data.shapes import CLASS_NAMES, TEST_COUNT, TRAIN_COUNT, make_shapes


def nearest_neighbour_accuracy(bank, bank_labels, queries, query_labels, k=200, temperature=0.1):
    """Accuracy of weighted kNN with cosine similarity, as in the evaluation of features."""
    bank, queries = (
        torch.nn.functional.normalize(torch.tensor(x, dtype=torch.float32), dim=1) for x in (bank, queries)
    )
    similarity, nearest = (queries @ bank.T).topk(k, dim=1)
    votes = torch.zeros(len(queries), len(CLASS_NAMES))
    votes.scatter_add_(1, torch.tensor(bank_labels)[nearest], (similarity / temperature).exp())
    return (votes.argmax(dim=1).numpy() == query_labels).mean()


@pytest.fixture(scope="module")
def train():
    return make_shapes(TRAIN_COUNT)


@pytest.fixture(scope="module")
def held_out():
    return make_shapes(TEST_COUNT, start=TRAIN_COUNT)


def test_an_image_depends_only_on_its_number():
    images, labels = make_shapes(40, seed=3)
    some, some_labels = make_shapes(7, seed=3, start=20)
    np.testing.assert_array_equal(some, images[20:27])
    np.testing.assert_array_equal(some_labels, labels[20:27])
    assert (make_shapes(40, seed=4)[0] != images).any(axis=(1, 2, 3)).all()


def test_every_image_is_grey_and_different(train):
    images, labels = train
    assert images.shape == (4000, 32, 32, 3)
    assert images.dtype == np.uint8
    assert (images[..., :1] == images).all()
    assert len(np.unique(images[..., 0].reshape(len(images), -1), axis=0)) == len(images)
    np.testing.assert_array_equal(np.bincount(labels), [400] * 10)


def test_train_and_test_share_no_noise(train, held_out):
    """If random numbers were reused, two images would share pixels exactly, which different noise cannot do."""
    seen, unseen = (x[0][:, :3, :, 0].reshape(len(x[0]), -1).astype(np.float32) for x in (train, held_out))
    assert not (unseen[:, None, :16] == seen[None, :, :16]).all(axis=2).any()


def test_raw_pixels_classify_poorly(train, held_out):
    """Between 40 and 55 % for raw pixels (chance is 10 %): there is signal, and room to improve."""
    flat = [x[0][..., 0].reshape(len(x[0]), -1) / 255 for x in (train, held_out)]
    assert 0.40 < nearest_neighbour_accuracy(flat[0], train[1], flat[1], held_out[1]) < 0.55
    centred = [x - flat[0].mean(axis=0) for x in flat]
    assert 0.40 < nearest_neighbour_accuracy(centred[0], train[1], centred[1], held_out[1]) < 0.55


def test_intensity_statistics_do_not_classify(train, held_out):
    """Mean, standard deviation and extremes of the intensity: little better than chance."""

    def statistics(images):
        grey = images[..., 0].reshape(len(images), -1) / 255
        return np.stack([grey.mean(axis=1), grey.std(axis=1), grey.min(axis=1), grey.max(axis=1)], axis=1)

    bank, queries = statistics(train[0]), statistics(held_out[0])
    bank, queries = ((x - bank.mean(axis=0)) / bank.std(axis=0) for x in (bank, queries))
    assert nearest_neighbour_accuracy(bank, train[1], queries, held_out[1]) < 0.30


def test_shapes_scale_with_the_side():
    """An image number gives the same drawing at another size: half-size averages agree up to the noise."""
    large = make_shapes(20, size=64)[0][..., 0].astype(float)
    small = make_shapes(20, size=32)[0][..., 0].astype(float)
    halved = large.reshape(20, 32, 2, 32, 2).mean(axis=(2, 4))
    assert np.abs(halved - small).mean() < 0.2 * 255 / 2 / 2 + 3  # half the noise's mean size, and soft edges
