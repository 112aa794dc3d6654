"""TensorBoard shows what a run and its evaluation write: scalars, pictures, and features in its projector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from tests.commands.test_cli import TINY

RUN = [argument for argument in TINY if argument != "--no-tensorboard"]


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's reader
def test_tensorboard_has_scalars_pictures_and_the_features_of_the_last_evaluation(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert main(["train", *RUN, "--log-every", "1", "--out", str(runs / "a")]) == ExitCode.DONE
    events = EventAccumulator(str(runs / "a" / "tb")).Reload()
    assert {"loss", "lr", "epoch"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"views", "curves"}
    (views,) = events.Images("views")
    assert views.encoded_image_string.startswith(b"\xff\xd8")
    assert 100 < views.width <= 1200

    arguments = ["--probes", "knn", "--knn-k", "3", "--limit", "60", "--data-root", str(tmp_path)]
    assert main(["eval", str(runs / "a"), *arguments]) == ExitCode.DONE
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(runs)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(runs))
    plugin = ProjectorPlugin(TBContext(logdir=str(runs), data_provider=provider))
    plugin._update_configs()
    run = str(Path("a") / "tb")
    (embedding,) = plugin._configs[run].embeddings
    folder = runs / "a" / "tb"
    features = plugin.tensor_cache.get((run, embedding.tensor_name))
    assert features is not None
    record = json.loads((runs / "a" / "eval" / "eval.json").read_text())
    assert features.shape == (60, record["backbone"]["feature_dim"])
    assert np.isfinite(features).all()
    header, *rows = (folder / embedding.metadata_path).read_text().splitlines()
    assert header == "path\tlabel"
    assert len(rows) == 60
    assert {row.split("\t")[1] for row in rows} <= set(record["data"]["classes"])
    side = embedding.sprite.single_image_dim[0]
    with Image.open(folder / embedding.sprite.image_path) as sprite:
        assert sprite.size == (8 * side, 8 * side)  # ⌈√60⌉
        assert np.asarray(sprite)[:side, :side].std() > 1
    assert main(["train", *RUN, "--overwrite", "--out", str(runs / "a")]) == ExitCode.DONE
    assert not (folder / "features.png").exists()
