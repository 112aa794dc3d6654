"""`fastmoco embed`: files of features, neighbours and near-duplicates, the same on every pipeline."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco import embed, load_backbone
from fastmoco.cli import main
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.evaluation import embeddings as module
from fastmoco.evaluation.embed_options import parse_embed
from pipelines.data.shapes import make_shapes
from tools.make_ffcv import main as make_ffcv

CLASSES = ("circle", "square")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val with two classes each, of several sizes; train/square/4.jpg is a copy of train/circle/0.jpg."""
    root = tmp_path_factory.mktemp("data") / "photos"
    pixels, _ = make_shapes(20, start=0)
    number = 0
    for split, count in (("train", 5), ("val", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(pixels[number]).resize((40 + 3 * number, 50))
                image.save(root / split / name / f"{i}.jpg", quality=95)
                number += 1
    (root / "train" / "square" / "4.jpg").write_bytes((root / "train" / "circle" / "0.jpg").read_bytes())
    return root


@pytest.fixture
def run(tmp_path: Path, photos: Path, shapes_run: Path, capsys: pytest.CaptureFixture[str]):
    """Run `fastmoco embed` on the photos with the backbone of that run; returns exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        common = ["--backbone", str(shapes_run), "--device", "cpu", "--data-root", str(tmp_path / "cache")]
        code = main(["embed", str(photos), *common, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def expected_features(shapes_run: Path, paths: list[str]) -> np.ndarray:
    """What a reader of the README computes: one image at a time."""
    backbone, preprocess = load_backbone(shapes_run)
    with torch.no_grad():
        return torch.cat([backbone(preprocess(Image.open(path))[None]) for path in paths]).numpy()


def test_npz_has_the_features_of_every_image_with_paths_and_labels(
    run, photos: Path, shapes_run: Path, tmp_path: Path
) -> None:
    code, output, _ = run("-o", tmp_path / "f.npz", "--neighbours", "3", "--duplicates", "0.99999")
    assert code == ExitCode.DONE
    assert "2 images in 1 group" in output
    file = np.load(tmp_path / "f.npz")
    paths = file["paths"].tolist()
    assert sorted(paths) == sorted(str(path) for path in photos.rglob("*.jpg"))
    assert file["splits"].tolist() == ["train"] * 10 + ["test"] * 4
    assert file["labels"].tolist() == [Path(path).parent.name for path in paths]
    assert file["features"].dtype == np.float32
    np.testing.assert_allclose(file["features"], expected_features(shapes_run, paths), rtol=1e-4, atol=1e-5)
    about = json.loads(str(file["about"]))
    assert (about["side"], about["normalized"]) == (16, False)
    near = np.load(tmp_path / "f.neighbours.npz")
    copy, original = (paths.index(str(photos / "train" / name)) for name in ("square/4.jpg", "circle/0.jpg"))
    assert near["rows"][copy, 0] == original
    assert near["cosine"][copy, 0] == pytest.approx(1.0, abs=1e-6)
    assert near["rows"].shape == (14, 3)
    with (tmp_path / "f.duplicates.csv").open(newline="") as lines:
        groups = list(csv.DictReader(lines))
    assert {row["path"] for row in groups} == {paths[copy], paths[original]}
    assert {row["group"] for row in groups} == {"0"}


def test_npy_has_its_paths_beside_it_and_may_be_normalised(run, shapes_run: Path, tmp_path: Path) -> None:
    assert run("-o", tmp_path / "f.npy", "--normalize")[0] == ExitCode.DONE
    with (tmp_path / "f.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    features = np.load(tmp_path / "f.npy")
    expected = expected_features(shapes_run, [row["path"] for row in rows])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["f.csv", "f.npy"]


def test_parquet_equals_npz(run, tmp_path: Path, require_backend: Callable[[str], None]) -> None:
    require_backend("parquet")
    from pyarrow import parquet

    for name in ("f.parquet", "f.npz"):
        assert run("-o", tmp_path / name, "--neighbours", "2")[0] == ExitCode.DONE
    table, arrays = parquet.read_table(tmp_path / "f.parquet"), np.load(tmp_path / "f.npz")
    assert table.column_names == ["path", "split", "label", "features"]
    assert table["path"].to_pylist() == arrays["paths"].tolist()
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    features = np.array(table["features"].to_pylist(), dtype=np.float32)
    assert (features == arrays["features"]).all()
    near, expected = parquet.read_table(tmp_path / "f.neighbours.parquet"), np.load(tmp_path / "f.neighbours.npz")
    assert near["neighbour_rows"].to_pylist() == expected["rows"].tolist()
    assert near["neighbour_paths"][3].as_py() == [arrays["paths"][row] for row in expected["rows"][3]]
    assert json.loads(table.schema.metadata[b"fastmoco"])["side"] == 16


def test_parquet_without_pyarrow_is_one_line_before_any_work(
    shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name))
    with pytest.raises(ConfigError, match="needs pyarrow, which is not installed: uv sync"):
        parse_embed(["nowhere", "--backbone", str(shapes_run), "-o", str(tmp_path / "f.parquet")])


def test_nothing_is_replaced_without_being_asked(run, tmp_path: Path) -> None:
    (tmp_path / "f.duplicates.csv").write_text("mine")
    code, _, error = run("-o", tmp_path / "f.npz", "--duplicates")
    assert code == ExitCode.CONFIG
    assert "f.duplicates.csv exists: use --overwrite" in error
    assert not (tmp_path / "f.npz").exists()
    assert run("-o", tmp_path / "f.npz", "--duplicates", "--overwrite")[0] == ExitCode.DONE
    assert (tmp_path / "f.duplicates.csv").read_text().startswith("group,row,path,cosine\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "f.csv"], "expected a name that ends with .parquet, .npz or .npy"),
        (["-o", "nowhere/f.npz"], "there is no folder"),
        (["-o", "f.npz", "--neighbours", "0"], "--neighbours is 0, expected 1 or more"),
        (["-o", "f.npz", "--duplicates", "1.5"], "--duplicates is 1.5, expected a cosine similarity above 0"),
        (["-o", "f.npz", "--pipeline", "dataloader"], "--pipeline is 'dataloader', expected one of auto, resident"),
    ],
)
def test_invalid_arguments_are_one_line(run, arguments: list[str], message: str) -> None:
    code, _, error = run(*arguments)
    assert code == ExitCode.CONFIG
    assert message in error
    assert error.count("\n") == 1


def test_without_room_in_memory_features_are_in_a_file(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has no name, and features are extracted batch by batch, without the cache."""
    assert run("-o", tmp_path / "all.npz")[0] == ExitCode.DONE
    monkeypatch.setattr(module, "budget_bytes", lambda device: 0)
    monkeypatch.setattr("fastmoco.evaluation.extractor.budget_bytes", lambda device: 0)
    made: list[type] = []
    fill = module.compute
    monkeypatch.setattr("fastmoco.commands.embed.compute", lambda *a, **k: (made.append(type(a[1])), fill(*a, **k))[1])
    assert run("-o", tmp_path / "file.npz", "--no-feature-cache")[0] == ExitCode.DONE
    assert made == [np.memmap]
    one, other = np.load(tmp_path / "all.npz"), np.load(tmp_path / "file.npz")
    assert (one["features"] == other["features"]).all()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["all.npz", "file.npz"]


def test_json_is_one_result_and_quiet_one_line(run, tmp_path: Path) -> None:
    code, output, log = run("-o", tmp_path / "f.npz", "--json")
    assert code == ExitCode.DONE
    (result,) = map(json.loads, output.splitlines())
    assert (result["event"], result["images"], result["out"]) == ("result", 14, str(tmp_path / "f.npz"))
    assert "fastmoco embed" in log
    code, output, log = run("-o", tmp_path / "g.npz", "--quiet")
    assert (code, log) == (ExitCode.DONE, "")
    assert output.startswith("done: features 14 × ")
    assert output.count("\n") == 1


def test_embed_from_python(photos: Path, shapes_run: Path, tmp_path: Path) -> None:
    found = embed(photos, shapes_run, normalize=True, device="cpu", data_root=str(tmp_path))
    assert len(found) == 14
    assert found.labels[0] == "circle"
    np.testing.assert_allclose(np.linalg.norm(found.features, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("pipeline", ["resident", "dali", "ffcv"])
def test_every_pipeline_gives_the_same_features(
    pipeline: str, photos: Path, shapes_run: Path, tmp_path: Path, require_backend: Callable[[str], None]
) -> None:
    options = {"device": "cpu", "data_root": str(tmp_path), "feature_cache": False, "workers": 1}
    expected = embed(photos / "train", shapes_run, pipeline="torch", **options)
    data = photos / "train"
    if pipeline in ("dali", "ffcv"):
        require_backend(pipeline)
    if pipeline == "ffcv":
        data = tmp_path / "train.beton"
        make_ffcv([str(photos / "train"), str(data), "--mode", "raw"])
    found = embed(data, shapes_run, pipeline=pipeline, **options)
    scale = np.abs(expected.features).max()
    tolerance = 1e-5 if pipeline == "resident" else 0.02  # the others decode JPEG or resize with rounding of their own
    np.testing.assert_allclose(found.features, expected.features, atol=tolerance * scale)
    assert [Path(path.split(" in ")[0]).name for path in found.paths] == [Path(path).name for path in expected.paths]
