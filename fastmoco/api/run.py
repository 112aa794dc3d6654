"""A run as an object: its folder, and what is in it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastmoco.backbones.preprocessing import Preprocessing
from fastmoco.config import RunConfig
from fastmoco.config.resume import as_settings, run_of
from fastmoco.errors import ConfigError
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.metrics import FILE_NAME, read_metrics
from pipelines.files import absolute


@dataclass(frozen=True, repr=False)
class Run:
    """A folder that `fastmoco.train` or `fastmoco train` wrote; everything is read from it when it is asked for.

        >>> from fastmoco import Run
        >>> run = Run("runs/photos")
        >>> run.status["state"], run.config.model.arch
        ('done', 'resnet18')
        >>> [record["loss"] for record in run.metrics if "loss" in record][-1] > 0
        True
        >>> features, preprocess = run.backbone()

    path   the folder; a checkpoint in it is taken for the folder
    model  of a run of a model of one's own (`fastmoco.train(model=...)`), such a module, to hold the weights

    Raises ConfigError if there is no run in that folder.
    """

    path: Path
    model: nn.Module | None = field(default=None, compare=False)

    def __init__(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        given = Path(absolute(path))
        object.__setattr__(self, "path", run_of(given) or given)
        object.__setattr__(self, "model", model)
        _ = self.config  # raises if it is no run

    @property
    def config(self) -> RunConfig:
        """Its settings, resolved: `run.config.optim.lr`; `run.config.flat()` is all of them by name.

        Without the switches that hold for one start (resume, overwrite, allow_changed): `train(run.config, out=...)`
        repeats the run.
        """
        return as_settings(read_config(self.path))

    @property
    def status(self) -> dict[str, Any]:
        """state (running, done, preempted, failed), exit_code, message, step, epoch, updated, versions."""
        return read_status(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Records in the order of the steps, with units in the names: loss and images_per_s of every few steps, and
        knn_top1_percent of every evaluation."""
        path = self.path / FILE_NAME
        return read_metrics(path) if path.is_file() else []

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that are kept, oldest first: each can be evaluated, exported and gone on from."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))

    def backbone(self) -> tuple[nn.Module, Preprocessing]:
        """The backbone, (B, 3, S, S) → (B, D), and the preprocessing of its images: see `fastmoco.load_backbone`."""
        from fastmoco.api.functions import load_backbone

        return load_backbone(self)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        """`Run('runs/a'): done, 10 epochs, kNN 41.7 %`, and what to do with it."""
        try:
            status = self.status
            said = [status["state"], f"{status.get('epoch', 0)} epochs"]
            knn = [record["knn_top1_percent"] for record in self.metrics if "knn_top1_percent" in record]
            said += [f"kNN {knn[-1]:.1f} %"] if knn else []
        except (ConfigError, OSError):
            said = ["not begun"]
        lines = [
            f"Run({os.path.relpath(self.path)!r}): {', '.join(said)}",
            "  .config .status .metrics .checkpoints .backbone()",
            "  fastmoco.evaluate(run)  fastmoco.export(run, to='timm')  fastmoco.train(resume=run)",
        ]
        return "\n".join(lines)
