"""Tar archives give the same run as the folder they were made from, and their content is not trusted."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.presets import AUGMENTATIONS
from pipelines.backends.select import open_source
from pipelines.data import shard_writer
from pipelines.data.dataset import load_dataset
from pipelines.data.index import Dataset
from pipelines.errors import DataError
from pipelines.plan.planner import Planner
from tools import make_shards

CPU = torch.device("cpu")
CLASSES = ("cat", "dog")


def encoded(seed: int, height: int = 20, width: int = 28, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 6 test images of two classes, JPEG and PNG of several sizes."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 15), ("val", 3)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                kind = "PNG" if i % 5 == 4 else "JPEG"
                data = encoded(100 * number + i, 16 + i, 40 - i, kind)
                (root / split / name / f"{i:02d}.v1.{kind.lower()}").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in archives of about ten images."""
    root = tmp_path_factory.mktemp("packed")
    for name, split in (("train", "train"), ("val", "test")):
        arguments = [str(folder), str(root / name), "--split", split, "--shard-mib", "0.02"]
        assert make_shards.main(arguments) == 0
    return root


def load(path: Path | str, **options: object) -> Dataset:
    return load_dataset(str(path), data_root="unused", **options)  # type: ignore[arg-type]


def test_the_archives_have_the_content_of_the_folder(folder: Path, packed: Path) -> None:
    unpacked, archived = load(folder), load(packed)
    assert archived.test is not None
    assert unpacked.test is not None
    for a, b in ((archived.train, unpacked.train), (archived.test, unpacked.test)):
        assert np.array_equal(a.sizes, b.sizes)
        assert a.labels is not None
        assert b.labels is not None
        assert np.array_equal(a.labels, b.labels)
        assert a.class_names == b.class_names == CLASSES
        assert all(a.read_bytes(i) == b.read_bytes(i) for i in range(len(a)))
    archives = sorted((packed / "train").glob("*.tar"))
    assert len(archives) > 2
    assert archived.train.describe().endswith(f"2 classes, in {len(archives)} tar archives")
    assert "00000003.jpeg in " in archived.train.display_name(3)


@pytest.mark.parametrize("pipeline", ["torch", "dali", "resident"])
def test_the_crops_equal_those_of_the_folder(
    folder: Path, packed: Path, pipeline: str, require_backend: Callable[[str], None]
) -> None:
    if pipeline == "dali":
        require_backend("dali")
    results = []
    for data in (folder, packed):
        index = load(data).train
        planner = Planner(index.sizes, seed=3, batch_size=10, augmentation=AUGMENTATIONS["v2"], shuffle_keys=True)
        source = open_source(pipeline, index, 16, CPU, 0 if pipeline == "torch" else 1)
        results.append([(crops.images.clone(), crops.plan) for crops in source.crops(planner.plans(0, 5))])
        source.close()
    for (images, plan), (same_images, same_plan) in zip(*results, strict=True):
        assert np.array_equal(plan.indices, same_plan.indices)
        assert np.array_equal(plan.boxes, same_plan.boxes)
        assert torch.equal(images, same_images)


def test_a_pattern_names_archives_in_order(packed: Path) -> None:
    count = len(list((packed / "train").glob("*.tar")))
    by_pattern = load(f"{packed}/train/{{000000..{count - 1:06d}}}.tar").train
    assert np.array_equal(by_pattern.sizes, load(packed).train.sizes)
    one = load(packed / "train" / "000001.tar").train
    assert one.records is not None
    assert one.records.names[0] == by_pattern.records.names[list(by_pattern.records.files).index(1)]  # type: ignore
    with pytest.raises(DataError, match=rf"{count:06d}\.tar does not exist"):
        load(f"{packed}/train/{{000000..{count:06d}}}.tar")


def test_archives_named_for_their_split_are_split(tmp_path: Path) -> None:
    for name in ("x-train-0.tar", "x-train-1.tar", "x-val-0.tar"):
        write_tar(tmp_path / name, {f"a{name[-5]}.jpg": encoded(1), f"b{name[-5]}.jpg": encoded(2)})
    dataset = load(tmp_path)
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    assert dataset.train.labels is None


def test_folders_inside_are_classes_without_labels(tmp_path: Path) -> None:
    images = {f"{name}/{i}.png": encoded(i, kind="PNG") for name in ("b", "a") for i in range(2)}
    index = load(write_tar(tmp_path / "x.tar", images | {"README": b"hello"})).train
    assert index.class_names == ("a", "b")
    assert index.labels is not None
    assert index.labels.tolist() == [1, 1, 0, 0]


def test_shuffling_keeps_every_image_and_its_label(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert make_shards.main([str(folder), str(tmp_path / name), "--shuffle", "7"]) == 0
    first, again, plain = load(tmp_path / "one").train, load(tmp_path / "two").train, load(folder).train
    contents = [first.read_bytes(i) for i in range(len(first))]
    assert contents == [again.read_bytes(i) for i in range(len(again))]
    assert contents != [plain.read_bytes(i) for i in range(len(plain))]
    assert first.labels is not None
    assert plain.labels is not None
    pairs = {plain.read_bytes(i): plain.labels[i] for i in range(len(plain))}
    assert {content: first.labels[i] for i, content in enumerate(contents)} == pairs


def test_a_selection_of_the_images_is_small_to_send(packed: Path) -> None:
    index = load(packed).train
    records = index.select(np.array([5, 2])).records
    assert records is not None
    assert len(records.paths) == 1
    assert len(pickle.dumps(records)) < 2_000
    assert records.read(1) == index.read_bytes(2)


# ---- untrusted content ----------------------------------------------------------------------------------------------


def test_links_and_devices_are_skipped_and_outside_paths_are_only_names(tmp_path: Path) -> None:
    link, device = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("device.jpg")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    path = write_tar(
        tmp_path / "in" / "x.tar", {"../../evil.jpg": encoded(1), "/abs.jpg": encoded(2), "l": link, "d": device}
    )
    dataset = load(path)
    assert len(dataset.train) == 2
    assert dataset.skipped == 2
    assert dataset.train.read(0).shape == (20, 28, 3)
    assert {entry.name for entry in tmp_path.rglob("*")} == {"in", "x.tar"}, "nothing was extracted"


@pytest.mark.parametrize(
    ("bytes_left", "message"),
    [(-700, "truncated"), (1500, "not a readable tar archive"), (0, "not a readable tar archive")],
)
def test_a_shortened_archive_is_refused(tmp_path: Path, bytes_left: int, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encoded(1, 200, 200), "b.jpg": encoded(2, 200, 200)})
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    members_end = last.offset_data + -(-last.size // 512) * 512
    os.truncate(path, bytes_left if bytes_left >= 0 else members_end + 512)
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_compressed_archive_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": encoded(1)})
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    for path in (tmp_path, tmp_path / "b.tar.gz"):
        with pytest.raises(DataError, match=r"b\.tar\.gz is compressed.*make_shards"):
            load(path)


def test_labels_may_be_missing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encoded(1), "a.cls": b"0", "b.jpg": encoded(2)})
    dataset = load(path)
    assert (len(dataset.train), dataset.train.labels) == (2, None)
    assert dataset.bank is not None
    assert (len(dataset.bank), dataset.bank.class_names) == (1, ("0",))
    assert dataset.choices.labels == "labels in .cls files; 1 of 2 images have none"


def test_names_of_classes_that_do_not_fit_are_not_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": encoded(1), "a.cls": b"2", "b.jpg": encoded(2), "b.cls": b"1"})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    dataset = load(path)
    assert dataset.train.class_names == ("1", "2")
    assert "classes.txt is not used: it names 2 classes, and there is a label 2" in dataset.choices.labels


def test_links_to_members_and_content_without_a_name_are_images(tmp_path: Path) -> None:
    link, soft, dangling = (tarfile.TarInfo(name) for name in ("copy.jpg", "b/soft.jpg", "dangling.jpg"))
    link.type, link.linkname = tarfile.LNKTYPE, "a/1.jpg"
    soft.type, soft.linkname = tarfile.SYMTYPE, "../a/1.jpg"
    dangling.type, dangling.linkname = tarfile.SYMTYPE, "nowhere.jpg"
    members = {
        "s": soft,
        "a/1.jpg": encoded(1),
        "h": link,
        "a/2": encoded(2),
        "a/notes": b"P4 is no image",
        "d": dangling,
    }
    dataset = load(write_tar(tmp_path / "x.tar", members))
    assert dataset.train.records is not None
    assert dataset.train.records.names == ("b/soft.jpg", "a/1.jpg", "copy.jpg", "a/2")
    assert [dataset.train.read_bytes(i) for i in (0, 2, 3)] == [encoded(1), encoded(1), encoded(2)]
    assert dict(dataset.choices.others) == {"": 1, "links elsewhere": 1}


def test_images_beside_an_archive_are_the_data(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "train" / "raw.tar", {"a.jpg": encoded(1)})
    for name in ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(encoded(3))
    dataset = load(tmp_path / "set")
    assert dataset.train.paths is not None
    assert dataset.train.class_names == ("cat", "dog")
    assert dict(dataset.choices.others) == {".tar": 1}


def test_archives_of_other_classes_do_not_evaluate(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {"a.jpg": encoded(1), "a.cls": b"0", "b.jpg": encoded(2), "b.cls": b"1"})
    write_tar(tmp_path / "val.tar", {"a.jpg": encoded(1), "a.cls": b"1", "b.jpg": encoded(2), "b.cls": b"7"})
    dataset = load(tmp_path)
    assert dataset.test is not None
    assert dataset.test.labels is not None
    assert dataset.test.labels.tolist() == [1]
    assert dataset.choices.evaluation == "1 image is left out, of classes that are not trained on: 7"


def test_bad_images_stop_or_are_left_out(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {f"{i:02d}.jpg": encoded(i) for i in range(20)}
    members["07.jpg"] = encoded(7)[:300]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"1 of 20 images .*07\.jpg in .*x\.tar"):
        load(path)
    dataset = load(path, bad_images="quarantine")
    assert len(dataset.train) == 19
    assert dataset.quarantine[0][0] == f"07.jpg in {path}"


def test_packing_leaves_nothing_incomplete(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "_add", fail)
    assert make_shards.main([str(folder), str(tmp_path / "out")]) == 3
    assert list(tmp_path.iterdir()) == []


def test_packing_refuses_a_folder_with_something_in_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shards.main([str(folder), str(folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
