"""`fastmoco embed`: the features of every image in a file, with nearest neighbours and near-duplicates beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from fastmoco.console import Fact, duration, make_console, show_facts, show_result, shown_path
from fastmoco.device import describe
from fastmoco.errors import cannot_write
from fastmoco.evaluation.embed_options import EmbedOptions
from fastmoco.evaluation.embedding_files import write_embeddings, write_groups, write_neighbours
from fastmoco.evaluation.embeddings import Embeddings, Prepared, check_count, compute, embedding, room_for
from fastmoco.evaluation.neighbours import duplicate_groups, nearest
from fastmoco.evaluation.report import backbone_facts
from fastmoco.run.data_facts import data_facts

_SHOWN = 3  # groups of near-duplicates


def embed_command(options: EmbedOptions) -> None:
    """Embed, write the files and print a summary.

    Raises ConfigError, DataError, CheckpointError (also for a full disk), BackendMissingError and DeviceError.
    """
    console, began, path = make_console(), time.monotonic(), options.path
    with embedding(options, console) as prepared:
        check_count(prepared, options)
        show_facts(console, "fastmoco embed", _facts(prepared, options))
        try:
            with room_for(prepared.count, prepared.backbone.feature_dim, path.parent) as features:
                embeddings = compute(prepared, features, normalize=options.normalize)
                write_embeddings(embeddings, path, options.beside.get("paths"))
                facts = _compare(embeddings, prepared, options, console)
        except OSError as error:
            raise cannot_write(Path(error.filename or path), error) from error
        kind = "length 1" if options.normalize else "as the backbone gives them"
        shape = f"{len(embeddings):,} × {features.shape[1]:,} float32"
        written = [Fact("", shown_path(file)) for file in options.beside.values()]
        show_result(
            console,
            "done",
            [
                Fact("features", shape, kind),
                *facts,
                Fact("time", duration(time.monotonic() - began)),
                Fact("written", shown_path(path), f"{path.stat().st_size / 2**20:,.1f} MiB"),
                *written,
            ],
            images=len(embeddings),
            feature_dim=features.shape[1],
            out=str(path),
            files={name: str(file) for name, file in options.beside.items()},
        )


def _facts(prepared: Prepared, options: EmbedOptions) -> list[Fact]:
    backbone, device = prepared.backbone, prepared.extractor.device
    return [
        *backbone_facts(backbone),
        *data_facts(prepared.dataset)[:-1],
        *(Fact(f"and {split}", index.describe()) for split, index in list(prepared.parts.items())[1:]),
        Fact("views", f"{backbone.side} pixels, centre crop"),
        Fact("device", f"{describe(device)}, {options.amp}"),
    ]


def _compare(embeddings: Embeddings, prepared: Prepared, options: EmbedOptions, console: Console) -> list[Fact]:
    """Write neighbours and near-duplicates as far as they are asked for, and describe them."""
    device, files, facts = prepared.extractor.device, options.beside, []
    if options.neighbours is not None:
        rows, cosine = nearest(embeddings.features, options.neighbours, device, console)
        write_neighbours(embeddings, rows, cosine, files["neighbours"])
        low, middle, high = np.percentile(cosine[:, 0], (5, 50, 95))
        text = f"{rows.shape[1]} of each image; cosine to the nearest {middle:.4f}"
        facts.append(Fact("neighbours", text, f"the middle 90 %: {low:.4f} to {high:.4f}"))
    if options.duplicates is not None:
        groups = duplicate_groups(embeddings.features, options.duplicates, device, console)
        write_groups(embeddings, groups, files["duplicates"])
        facts += _duplicate_facts(groups, embeddings, options.duplicates)
    return facts


def _duplicate_facts(groups: Sequence[np.ndarray], embeddings: Embeddings, cosine: float) -> list[Fact]:
    why = f"cosine similarity of {cosine:g} or more"
    if not groups:
        return [Fact("near-duplicates", "none", why)]
    images = sum(map(len, groups))
    facts = [Fact("near-duplicates", f"{images:,} images in {len(groups):,} group{'s' * (len(groups) > 1)}", why)]
    for rows in groups[:_SHOWN]:
        more = f"with {len(rows) - 2:,} more" if len(rows) > 2 else ""
        first, second = (shown_path(embeddings.paths[row]) for row in rows[:2])
        facts.append(Fact("", f"{first} and {second}", more))
    return facts
