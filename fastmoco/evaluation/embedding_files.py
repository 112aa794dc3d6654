"""Files of embeddings: Parquet or NumPy, and beside them nearest neighbours and groups of near-duplicates.

N images · D length of a feature · k neighbours

FILE.parquet     path, split, label and features, a list of D float32; about the backbone in the metadata `fastmoco`
FILE.npz         features (N, D) float32, paths, splits, labels ('' without) and about, as JSON
FILE.npy         features (N, D) float32; FILE.csv has path, label and split, in the same order
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.evaluation.embeddings import Embeddings
from pipelines.data.decode import printable
from pipelines.files import replacing, write_csv

_ROWS = 8192  # of a row group


def write_embeddings(embeddings: Embeddings, path: Path, beside: Path | None = None) -> None:
    """Write a .parquet, .npz or .npy, or for the last also `beside`, atomically. Raises OSError."""
    size, kind = embeddings.features.nbytes, path.suffix.lower()
    with replacing(path, size) as part:
        if kind == ".parquet":
            _write_parquet(embeddings, part)
        elif kind == ".npz":
            labels = [label or "" for label in embeddings.labels]
            names = {"paths": embeddings.paths, "splits": embeddings.splits, "labels": labels}
            with part.open("wb") as file:
                np.savez(file, features=embeddings.features, about=json.dumps(embeddings.about), **_texts(names))
        else:
            with part.open("wb") as file:
                np.save(file, embeddings.features)
    if beside is not None:
        rows = zip(embeddings.paths, embeddings.labels, embeddings.splits, strict=True)
        write_csv(beside, ("path", "label", "split"), rows)


def write_neighbours(embeddings: Embeddings, rows: np.ndarray, cosine: np.ndarray, path: Path) -> None:
    """Write the nearest images, the nearest first: as lists in a .parquet, or arrays (N, k) in an .npz.

    Parquet has path, neighbour_paths, neighbour_rows and cosine; NumPy paths (N,), rows and cosine. Raises OSError.
    """
    with replacing(path, rows.nbytes + cosine.nbytes) as part:
        if path.suffix.lower() != ".parquet":
            with part.open("wb") as file:
                np.savez(file, rows=rows, cosine=cosine, **_texts({"paths": embeddings.paths}))
            return
        import pyarrow as pa  # an optional package
        import pyarrow.parquet

        paths, k = list(map(printable, embeddings.paths)), rows.shape[1]
        schema = pa.schema(
            {
                "path": pa.string(),
                "neighbour_paths": pa.list_(pa.string(), k),
                "neighbour_rows": pa.list_(pa.int64(), k),
                "cosine": pa.list_(pa.float32(), k),
            }
        )
        with pyarrow.parquet.ParquetWriter(part, schema) as writer:
            for begin in range(0, len(paths), _ROWS):
                near = rows[begin : begin + _ROWS].ravel()
                values = cosine[begin : begin + _ROWS].ravel()
                lists = [pa.array([paths[row] for row in near.tolist()], pa.string()), pa.array(near), pa.array(values)]
                columns = [pa.FixedSizeListArray.from_arrays(flat, k) for flat in lists]
                writer.write_batch(pa.record_batch([pa.array(paths[begin : begin + _ROWS]), *columns], schema=schema))


def write_groups(embeddings: Embeddings, groups: Sequence[np.ndarray], path: Path) -> None:
    """Write near-duplicates as CSV: group, row, path, and cosine similarity to the first image of the group."""
    lines = []
    for number, rows in enumerate(groups):
        features = embeddings.features[rows].astype(np.float64)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        for row, cosine in zip(rows.tolist(), features @ features[0], strict=True):
            lines.append((number, row, embeddings.paths[row], f"{cosine:.6f}"))
    write_csv(path, ("group", "row", "path", "cosine"), lines)


def _texts(columns: dict[str, list[str]]) -> dict[str, Any]:
    return {name: np.array(values, dtype=np.str_) for name, values in columns.items()}


def _write_parquet(embeddings: Embeddings, path: Path) -> None:
    import pyarrow as pa  # an optional package
    import pyarrow.parquet

    dim = embeddings.features.shape[1]
    columns = {"path": pa.string(), "split": pa.string(), "label": pa.string(), "features": pa.list_(pa.float32(), dim)}
    schema = pa.schema(columns, metadata={"fastmoco": json.dumps(embeddings.about)})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for begin in range(0, len(embeddings), _ROWS):
            part = slice(begin, begin + _ROWS)
            texts = [
                pa.array(list(map(printable, embeddings.paths[part])), pa.string()),
                pa.array(embeddings.splits[part], pa.string()),
                pa.array(embeddings.labels[part], pa.string()),
            ]
            flat = pa.array(np.ascontiguousarray(embeddings.features[part]).reshape(-1))
            writer.write_batch(pa.record_batch([*texts, pa.FixedSizeListArray.from_arrays(flat, dim)], schema=schema))
