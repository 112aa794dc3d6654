"""Folders, lists and names become indexes in a fixed order; unusable input is refused with a one-line message."""

import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.dataset import ImageIndex, limit_positions, load_dataset
from pipelines.errors import DataError
from tests.oddities import bad_files, encode, fill, good_files, picture, write_files


@pytest.fixture
def load(tmp_path):
    """load(data, ...) with named data sets in the test's own folder."""
    return lambda data, **options: load_dataset(str(data), data_root=tmp_path / "downloads", **options)


def names_of(index, folder):
    return [os.path.relpath(path, folder) for path in index.paths]


def refusal(load, data, **options):
    """The one-line message with which a data set is refused."""
    with pytest.raises(DataError) as caught:
        load(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_class_folders(load, tmp_path):
    folder = fill(tmp_path / "pets", "dog/2.png", "dog/10.png", "Cat/a.png", "cat/b.png")
    dataset = load(folder)
    assert names_of(dataset.train, folder) == ["Cat/a.png", "cat/b.png", "dog/10.png", "dog/2.png"]  # by bytes
    assert dataset.train.class_names == ("Cat", "cat", "dog")
    np.testing.assert_array_equal(dataset.train.labels, [0, 1, 2, 2])
    assert dataset.test is None
    assert dataset.bank is dataset.train


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("b.png", "a.png"), "all images are in one folder"),
        (("a/1.png", "a/2.png"), "all images are in one folder"),
        (("a/1.png", "c.png"), "all images are in one folder or beside it: a"),
        (("a/1.png", "b/1.png", "c.png", "d.png", "e.png"), "3 of 5 images are in pets itself, not in class folders"),
    ],
    ids=["flat", "one folder", "one at the root", "most at the root"],
)
def test_any_other_layout_has_no_labels_and_says_why(load, tmp_path, names, why):
    dataset = load(fill(tmp_path / "pets", *names))
    assert names_of(dataset.train, tmp_path / "pets") == sorted(names)
    assert dataset.train.labels is None
    assert dataset.train.class_names == ()
    assert dataset.bank is None
    assert dataset.choices.labels == why


def test_numbered_classes_are_in_the_order_of_their_numbers(load, tmp_path):
    dataset = load(fill(tmp_path, "10/a.png", "9/a.png"))
    assert dataset.train.class_names == ("9", "10")
    np.testing.assert_array_equal(dataset.train.labels, [1, 0])


@pytest.mark.parametrize(
    ("folders", "test"),
    [(("train", "val", "test"), "val"), (("Train", "Test"), "Test"), (("train", "validation"), "validation")],
)
def test_splits_are_found(load, tmp_path, folders, test):
    for folder in folders:
        fill(tmp_path / "set" / folder, "a/1.png", "b/1.png")
    dataset = load(tmp_path / "set")
    assert dataset.train.name == f"set/{folders[0]}"
    assert names_of(dataset.train, tmp_path / "set" / folders[0]) == ["a/1.png", "b/1.png"]
    assert names_of(dataset.test, tmp_path / "set" / test) == ["a/1.png", "b/1.png"]


def test_a_class_may_be_called_train(load, tmp_path):
    assert load(fill(tmp_path, "train/1.png", "ship/1.png")).train.class_names == ("ship", "train")


def test_other_files_are_skipped_and_counted(load, tmp_path):
    folder = fill(
        tmp_path / "f", "a.PNG", "b.jpeg", ".hidden.png", ".git/c.png", "__MACOSX/d.png", "readme.txt", "x.mp4", "y.mp4"
    )
    dataset = load(folder)
    assert names_of(dataset.train, folder) == ["a.PNG", "b.jpeg"]
    assert dataset.skipped == 3
    assert dataset.choices.passed_over() == "3 files: 2 .mp4, 1 .txt"


def test_cyclic_links_list_every_file_once(load, tmp_path):
    folder = fill(tmp_path / "f", "b/1.png", "c/2.png")
    (folder / "a").symlink_to(folder / "b")
    (folder / "b" / "up").symlink_to(folder)
    dataset = load(folder)
    assert names_of(dataset.train, folder) == ["b/1.png", "c/2.png"]
    assert dataset.train.class_names == ("b", "c")


def test_a_linked_class_folder_is_a_class_folder(load, tmp_path):
    fill(tmp_path / "elsewhere", "1.png")
    folder = fill(tmp_path / "f", "b/1.png")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    assert names_of(load(folder).train, folder) == ["a/1.png", "b/1.png"]


def test_every_odd_file_is_read_correctly(load, tmp_path):
    """The whole corpus in a folder: upright sizes, decoded pixels, for every name."""
    files = good_files()
    write_files(tmp_path / "odd", files)
    index = load(tmp_path / "odd").train
    expected = {file.name: file for file in files}
    assert sorted(names_of(index, tmp_path / "odd")) == sorted(expected)
    for i, name in enumerate(names_of(index, tmp_path / "odd")):
        file = expected[name]
        assert tuple(index.sizes[i]) == file.pixels.shape[:2]
        assert np.abs(index.read(i).astype(int) - file.pixels).mean() <= file.tolerance
        assert index.read_bytes(i) == file.data
        assert index.display_name(i).isprintable()


# Errors


def test_folders_that_cannot_be_used(load, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(load, tmp_path / "empty")
    assert re.search("holds no images .no files.; expected files that end in .jpg", message)
    fill(tmp_path / "docs", "a.txt", "b/c.pdf")
    assert re.search("holds no images .2 files: 1 .txt, 1 .pdf.", refusal(load, tmp_path / "docs"))


def test_an_unreadable_folder_is_named(load, tmp_path, monkeypatch):
    """Simulated, because permissions have no effect if tests run as root."""
    folder = fill(tmp_path / "f", "a/1.png", "b/1.png")
    scandir = os.scandir

    def forbid(path):
        if path == str(folder / "a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    assert re.search("cannot read the folder .*f/a .Permission denied.; make it readable", refusal(load, folder))


def test_a_name_that_does_not_exist(load, tmp_path):
    assert re.search("cifar-10 does not exist; .* did you mean cifar10", refusal(load, "cifar-10"))
    assert re.search("does not exist; .* names are cifar10, .*shapes", refusal(load, tmp_path / "nowhere"))
    assert re.search("the limit is 0", refusal(load, tmp_path, limit=0))


@pytest.mark.parametrize("bad", [bad for bad in bad_files() if bad.in_header], ids=lambda bad: bad.name)
def test_a_bad_file_stops_indexing_or_is_left_out(load, tmp_path, bad):
    folder = fill(tmp_path / "f", *(f"{i}.png" for i in range(10, 30)))
    write_files(folder, [bad])
    message = f"1 of 21 images of f are bad; .*quarantined. .*{bad.name} is not a usable image: .*({bad.reason})"
    assert re.search(message, refusal(load, folder))
    dataset = load(folder, bad_images="quarantine")
    assert len(dataset.train) == 20
    ((path, reason),) = dataset.quarantine
    assert path == str(folder / bad.name)
    assert bad.name in reason


def test_a_link_to_nothing_is_a_bad_file(load, tmp_path):
    folder = fill(tmp_path / "f", "a.png")
    (folder / "b.png").symlink_to(folder / "gone.png")
    assert re.search("b.png is not a usable image: No such file", refusal(load, folder))


def test_too_many_bad_files_are_not_left_out(load, tmp_path):
    folder = fill(tmp_path / "f", *(f"{i}.png" for i in range(8)))
    write_files(folder, [bad for bad in bad_files() if bad.name in ("empty.jpg", "text.jpg")])
    message = refusal(load, folder, bad_images="quarantine")
    assert re.search("2 of 10 images of f are bad; at most 10% may be left out", message)


def test_a_file_that_changes_or_vanishes_is_named(load, tmp_path):
    folder = fill(tmp_path / "f", "a.png", "b.png")
    index = load(folder).train
    (folder / "a.png").write_bytes(encode(picture(9, 9), "PNG"))
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match=r"a\.png is 9×9 pixels and was 3×4 when"):
        index.read(0)
    with pytest.raises(DataError, match=r"cannot read .*b\.png .No such file"):
        index.read(1)


# Lists


def test_a_list_keeps_its_order(load, tmp_path):
    fill(tmp_path / "images", "a.png", "b c.png", "Ä.png")
    (tmp_path / "list.txt").write_bytes("images/b c.png\r\nimages/Ä.png\n\nimages/a.png\n".encode())
    index = load(tmp_path / "list.txt").train
    assert names_of(index, tmp_path / "images") == ["b c.png", "Ä.png", "a.png"]
    assert index.labels is None
    (tmp_path / "labelled.txt").write_text(f"images/a.png\tfish\n{tmp_path}/images/b c.png\tbird\n")
    index = load(tmp_path / "labelled.txt").train
    assert names_of(index, tmp_path / "images") == ["a.png", "b c.png"]
    assert index.class_names == ("bird", "fish")
    np.testing.assert_array_equal(index.labels, [1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\x89PNG\0\0", "neither a folder nor a list; expected text"),
        (b"\n\n", "names no images"),
        (b"a.png\nnotes about a.png and others\n", "line 2 of .*list.txt is 'notes about a.png and others'; expected"),
        (b"gone.png\n", "gone.png is not a usable image: No such file"),
    ],
    ids=["binary", "blank", "prose", "missing file"],
)
def test_a_file_that_is_not_a_list(load, tmp_path, text, message):
    fill(tmp_path, "a.png")
    (tmp_path / "list.txt").write_bytes(text)
    assert re.search(message, refusal(load, tmp_path / "list.txt"))


# Limits and selections


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70), st.booleans())
@settings(deadline=None)
def test_a_limit_is_fair_and_keeps_the_order(labels, limit, labelled):
    labels = np.array(labels)
    kept = limit_positions(len(labels), labels if labelled else None, limit)
    assert len(kept) == min(limit, len(labels))
    assert (np.diff(kept) > 0).all()
    if not labelled:
        assert np.ptp(np.diff(kept, append=len(labels))) <= np.ceil(len(labels) / len(kept))
        return
    left_out = np.setdiff1d(np.arange(len(labels)), kept)
    for label in set(labels[left_out]):
        of_label = (labels[kept] == label).sum()
        assert of_label >= np.bincount(labels[kept]).max() - 1  # no class has two more than one with images left out
        assert kept[labels[kept] == label].max(initial=-1) < left_out[labels[left_out] == label].min()


def test_a_limit_opens_no_other_files(load, tmp_path):
    folder = fill(tmp_path / "f", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (folder / "a" / "2.png").write_bytes(b"")
    assert names_of(load(folder, limit=2).train, folder) == ["a/1.png", "b/1.png"]


def test_select_and_describe(load, tmp_path):
    index = load(fill(tmp_path / "f", "a/1.png", "a/2.png", "b/1.png")).train
    assert index.describe() == "f: 3 images of 3×4 (width×height), 2 classes, in files"
    assert index.uniform_size == (4, 3)
    selection = index.select(np.array([2, 0]))
    assert names_of(selection, tmp_path / "f") == ["b/1.png", "a/1.png"]
    np.testing.assert_array_equal(selection.labels, [1, 0])
    np.testing.assert_array_equal(selection.read(0), index.read(2))
    mixed = ImageIndex("m", np.array([[4, 3], [5, 9]], np.int32), paths=("x.png", "y.png"))
    assert mixed.uniform_size is None
    assert mixed.describe() == "m: 2 images of 3–9×4–5 (width×height), no labels, in files"


def test_cifar_folders(load, test_data):
    dataset = load(test_data / "cifar10", limit=50)
    assert dataset.train.describe() == "cifar10/train: 50 images of 32×32 (width×height), 10 classes, in files"
    assert (np.bincount(dataset.test.labels) == 5).all()
