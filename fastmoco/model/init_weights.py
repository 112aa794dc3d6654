"""Weights that training starts from in place of random ones: a backbone, and its projection head where that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.config import RunConfig
from fastmoco.config.resolved import ResolvedModel
from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.model.encoder import Encoder, feature_dim
from fastmoco.model.moco import MoCo


@dataclass(frozen=True)
class InitWeights:
    """What was read for `--init`: float32, on the CPU.

    arch, stem, width, channels
                       of the backbone, as in `encoder.build_encoder`
    backbone           its tensors, with the statistics of batch norm
    head               those of its projection head, named as in `Encoder.head`; empty if it has none
    sha256             of the content of both, wherever the file is
    origin             where they are from, for people
    """

    arch: str
    stem: str
    width: float
    channels: int
    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    sha256: str
    origin: str

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """The fields of a configuration that these weights decide. Raises ConfigError where others were given."""
        model = config.model
        for name, given, own in (
            ("arch", model.arch, self.arch),
            ("stem", None if model.stem == "auto" else model.stem, self.stem),
            ("width", None if model.width == 1 else model.width, self.width),
        ):
            if given not in (None, own):
                given, own = (f"{value:g}" if isinstance(value, float) else value for value in (given, own))
                raise ConfigError(
                    f"--{name} is {given}, and --init {model.init} has the {name} {own}: use --{name} {own}, or "
                    "another file"
                )
        if config.data.channels != self.channels:
            raise ConfigError(
                f"--channels is {config.data.channels}, and --init {model.init} reads images of {self.channels} "
                f"channels: use --channels {self.channels}, or another file"
            )
        if model.init_sha256 not in (None, self.sha256):
            raise ConfigError(
                f"--init {model.init} holds weights with the SHA-256 {self.sha256[:12]}…, and --init-sha256 is "
                f"{model.init_sha256[:12]}…: use the file it was recorded for, or --init-sha256 None"
            )
        return {"arch": self.arch, "stem": self.stem, "width": self.width, "init_sha256": self.sha256}

    def describe(self, model: ResolvedModel) -> str:
        """`resnet50 from FILE, 318 tensors; head fresh`."""
        hidden = (feature_dim(model.arch, model.width),) if model.mlp else model.head or ()
        with torch.device("meta"):
            head = Encoder(nn.Identity(), feature_dim(model.arch, model.width), hidden, model.moco_dim).head
        taken = "taken" if self._fits(head) else "fresh"
        return f"{self.arch} from {self.origin}, {len(self.backbone)} tensors; head {taken}"

    def _fits(self, head: nn.Module) -> bool:
        own = {name: tensor.shape for name, tensor in head.state_dict().items()}
        return own == {name: tensor.shape for name, tensor in self.head.items()}

    @torch.no_grad()
    def copy_to(self, encoder: Encoder) -> None:
        """Overwrite the backbone of an encoder, and its head if all of its layers have the shapes of these."""
        own = encoder.state_dict()
        new = {f"backbone.{name}": tensor for name, tensor in self.backbone.items()}
        assert new.keys() == {name for name in own if name.startswith("backbone.")}
        if self._fits(encoder.head):
            new |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        for name, tensor in new.items():
            own[name].copy_(tensor)


@torch.no_grad()
def start_from(weights: InitWeights | None, model: MoCo, world: World) -> None:
    """Copy the weights of rank 0, the only rank that has them, into the query encoder and the key encoder of all."""
    if weights is not None:
        weights.copy_to(model.query)
        weights.copy_to(model.key)  # its head is already a copy
    for tensor in model.state_dict().values():
        world.broadcast(tensor)
