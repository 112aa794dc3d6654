"""What folders are taken for: splits, classes, annotations; each with a reason, and with a flag to choose otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.dataset import load_dataset
from pipelines.data.index import Dataset
from pipelines.errors import DataError
from tests.oddities import fill

Load = Callable[..., Dataset]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(names, ...): the data set `set` with pictures of these names."""

    def load_names(*names: str, **options: object) -> Dataset:
        folder = fill(tmp_path / "set", *names)
        return load_dataset(str(folder), data_root=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return load_names


def names_of(dataset: Dataset, tmp_path: Path) -> list[str]:
    assert dataset.train.paths is not None
    return [os.path.relpath(path, tmp_path / "set") for path in dataset.train.paths]


def in_classes(folder: str, *classes: str) -> list[str]:
    return [f"{folder}/{name}/{i}.png" for name in classes for i in range(2)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("train_images", "val_images"),
        ("train2014", "val2014"),
        ("ILSVRC_train", "ILSVRC_val"),
        ("trn", "tst"),
        ("TRAIN", "TEST"),
    ],
)
def test_splits_by_name(load: Load, tmp_path: Path, train: str, test: str) -> None:
    dataset = load(*in_classes(train, "oak", "elm"), *in_classes(test, "oak", "elm"))
    assert {name.split("/")[0] for name in names_of(dataset, tmp_path)} == {train}
    assert dataset.test is not None
    assert dataset.test.name == f"set/{test}"
    assert dataset.test.class_names == ("elm", "oak")


def test_a_wrapper_is_entered(load: Load, tmp_path: Path) -> None:
    dataset = load(*in_classes("set-v2/train", "a", "b"), *in_classes("set-v2/valid", "a", "b"))
    assert dataset.train.name == "set/set-v2/train"
    assert dataset.test is not None
    assert dataset.train.class_names == ("a", "b")


def test_annotations_are_not_trained_on(load: Load, tmp_path: Path) -> None:
    dataset = load("images/1.png", "images/2.png", "Annotations/trimaps/1.png", "depth/1.png")
    assert names_of(dataset, tmp_path) == ["images/1.png", "images/2.png"]
    assert dataset.choices.not_used == (
        ("Annotations", "annotations of images"),
        ("depth", "annotations of images"),
    )
    chosen = load(train_folder="depth")
    assert names_of(chosen, tmp_path) == ["depth/1.png"]


def test_annotations_within_splits(load: Load, tmp_path: Path) -> None:
    dataset = load("train/rgb/1.png", "train/masks/1.png", "val/rgb/2.png", "val/masks/2.png")
    assert names_of(dataset, tmp_path) == ["train/rgb/1.png"]
    assert dataset.test is not None
    assert len(dataset.test) == 1


def test_folders_named_like_annotations_may_be_classes(load: Load) -> None:
    assert load(*in_classes(".", "mask", "no_mask")).train.class_names == ("mask", "no_mask")


def test_folders_without_images_are_no_classes(load: Load, tmp_path: Path) -> None:
    (tmp_path / "set" / "Annotations").mkdir(parents=True)
    (tmp_path / "set" / "Annotations" / "1.xml").write_text("x")
    (tmp_path / "set" / "empty").mkdir()
    dataset = load(*in_classes(".", "a", "b"))
    assert dataset.train.class_names == ("a", "b")
    assert dataset.choices.passed_over() == "1 file: 1 .xml"


def test_deeper_images_belong_to_the_first_folder(load: Load) -> None:
    dataset = load("finch/house/1.png", "finch/zebra/2.png", "wren/3.png")
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert dataset.choices.labels == "the first folders in set; images are deeper"


def test_a_stray_image_is_trained_on_and_has_no_class(load: Load, tmp_path: Path) -> None:
    dataset = load(*in_classes(".", "a", "b"), "cover.png")
    assert len(dataset.train) == 5
    assert dataset.train.labels is None
    assert dataset.bank is not None
    assert dataset.bank.labels is not None
    assert dataset.bank.labels.tolist() == [0, 0, 1, 1]
    assert dataset.choices.labels == "the folders in set; 1 of 5 images has none: cover.png"
    assert "labels for 4 of them" in dataset.train.describe()


def test_tiny_imagenet(load: Load, tmp_path: Path) -> None:
    """Images are in a folder `images` of each class, and those of val in one, with a table of their classes."""
    (tmp_path / "set" / "val").mkdir(parents=True)
    (tmp_path / "set/val/val_annotations.txt").write_text("7.png\tn02\t0\t0\t9\t9\n8.png\tn01\t0\t0\t9\t9\n")
    dataset = load(*(f"train/{name}/images/1.png" for name in ("n01", "n02")), "val/images/7.png", "val/images/8.png")
    assert dataset.train.class_names == ("n01", "n02")
    assert dataset.test is not None
    assert dataset.test.labels is not None
    assert dataset.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label\n1.png,b\n2.png,a\n"),
        ("metadata.jsonl", '{"file_name": "1.png", "label": "b"}\n{"file_name": "2.png", "label": "a"}\n'),
    ],
)
def test_a_table_beside_the_images(load: Load, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(text)
    dataset = load("1.png", "2.png", "3.png")
    assert dataset.bank is not None
    assert dataset.bank.labels is not None
    assert (dataset.bank.class_names, dataset.bank.labels.tolist()) == (("a", "b"), [1, 0])
    assert dataset.choices.labels == f"labels in {name}; 1 of 3 images has none: 3.png"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (
            "metadata.csv",
            "file_name,text\n1.png,a photo\n",
            "metadata.csv states no classes, for want of",
        ),
        ("metadata.csv", "file_name,label\n7.png,b\n", "metadata.csv names none of the images"),
        ("metadata.csv", "a,b,c\n1,2,3\n", "metadata.csv is not read: "),
        ("metadata.parquet", "PAR1", "metadata.parquet is not read"),
    ],
)
def test_a_table_that_gives_no_classes_is_said(load: Load, tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(text)
    dataset = load("1.png", "2.png")
    assert dataset.bank is None
    assert dataset.choices.labels.startswith(f"all images are in one folder; {why}")


def test_a_table_of_parquet(load: Load, tmp_path: Path, require_backend: Callable[[str], None]) -> None:
    require_backend("parquet")
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    table = pyarrow.table({"file_name": ["1.png", "2.png"], "text": ["", ""], "label": [7, 5]})
    parquet.write_table(table, tmp_path / "set" / "metadata.parquet")
    dataset = load("1.png", "2.png")
    assert dataset.bank is not None
    assert dataset.bank.labels is not None
    assert (dataset.bank.class_names, dataset.bank.labels.tolist()) == (("5", "7"), [1, 0])


@pytest.mark.parametrize(
    ("test", "labels", "why"),
    [
        (("a", "b", "z"), [0, 0, 1, 1], "2 images are left out, of classes that are not trained on: z"),
        (("b",), [1, 1], ""),
        (("y", "z"), None, "not val: none of its 2 classes is trained on"),
        ((), None, "val holds no images"),
    ],
)
def test_other_classes_in_the_test_split(
    load: Load, tmp_path: Path, test: tuple[str, ...], labels: list[int] | None, why: str
) -> None:
    (tmp_path / "set" / "val").mkdir(parents=True)
    dataset = load(*in_classes("train", "a", "b", "c"), *in_classes("val", *test))
    assert dataset.train.class_names == ("a", "b", "c")
    assert dataset.choices.evaluation == why
    if labels is None:
        assert dataset.test is None
    else:
        assert dataset.test is not None
        assert dataset.test.labels is not None
        assert (dataset.test.labels.tolist(), dataset.test.class_names) == (labels, ("a", "b", "c"))


def test_without_labels(load: Load) -> None:
    dataset = load(*in_classes("train", "a", "b"), *in_classes("val", "c"), labels=False)
    assert dataset.bank is None
    assert dataset.test is not None
    assert (dataset.train.labels, dataset.test.labels) == (None, None)
    assert dataset.choices.labels == "--no-labels"


def test_chosen_folders(load: Load, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "a/1.png", "b/2.png")
    names = (*in_classes("small", "a", "b"), *in_classes("large", "a", "b", "c"), *in_classes("val", "a"))
    dataset = load(*names, train_folder="large", test_folder=str(tmp_path / "elsewhere"))
    assert dataset.train.name == "set/large"
    assert dataset.test is not None
    assert len(dataset.test) == 2
    guessed = load(train_folder="small")
    assert guessed.test is not None
    assert guessed.test.name == "set/val"
    held_out = load(test_folder="small")
    assert "set/small" not in {os.path.dirname(name) for name in names_of(held_out, tmp_path)}
    with pytest.raises(DataError, match="--train-folder nowhere is no folder in"):
        load(train_folder="nowhere")
    with pytest.raises(DataError, match="--test-folder names a folder in a folder of images, and shapes is none"):
        load_dataset("shapes", data_root=tmp_path, test_folder="x")


def test_several_data_sets_are_one(tmp_path: Path) -> None:
    fill(tmp_path / "x", *in_classes("train", "a", "b"), *in_classes("val", "a", "q"))
    fill(tmp_path / "y", *in_classes(".", "b", "c"))
    (tmp_path / "z.txt").write_text("y/c/0.png\nextra.png\n")
    fill(tmp_path, "extra.png")
    dataset = load_dataset([str(tmp_path / name) for name in ("x", "y", "z.txt")], data_root=tmp_path / "cache")
    assert len(dataset.train) == 9, "an image in two of them is used once"
    assert dataset.bank is not None
    assert dataset.bank.labels is not None
    assert dataset.bank.class_names == ("a", "b", "c")
    assert dataset.bank.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert dataset.test is not None
    assert len(dataset.test) == 2
    with pytest.raises(DataError, match="shapes cannot be joined with other data"):
        load_dataset([str(tmp_path / "x"), "shapes"], data_root=tmp_path)


def test_outputs_of_fastmoco_are_no_data(load: Load, tmp_path: Path) -> None:
    for folder, name, text in (
        ("runs/1", "status.json", '{"state": "done", "exit_code": 0, "step": 1, "versions": {}}'),
        ("runs/2", "config.json", '{"data": 1, "augment": 1, "model": 1, "optim": 1, "run": 1}'),
        ("a/results", "eval.json", '{"backbone": 1, "probes": 1, "label_free": 1}'),
        ("sweep", "sweep.json", '{"recipe": 1, "command": 1, "runs": []}'),
    ):
        fill(tmp_path / "set" / folder, "views.png", "deeper/1.png")
        (tmp_path / "set" / folder / name).write_text(text)
    fill(tmp_path / "set/old/checkpoints", "step-000000001.safetensors")
    dataset = load(*in_classes(".", "a", "b"), "old/views.png")
    assert names_of(dataset, tmp_path) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert dataset.train.class_names == ("a", "b")
    ((_, why),) = dataset.choices.not_used
    assert sorted(why.removesuffix(" of fastmoco").split(", ")) == ["1 evaluation", "1 sweep", "3 runs"]


def test_files_of_others_with_such_names_are_data(load: Load, tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "config.json").write_text('{"model": "of another program"}')
    (tmp_path / "set" / "a" / "status.json").write_text("no JSON")
    assert len(load("a/views.png", "a/curves.png", "b/checkpoints/1.png").train) == 3
