"""A peer: MoCo from the building blocks of lightly, assembled as in its documentation.

Its example uses plain batch norm and does not shuffle keys, which is less work than in the authors' code and ours.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.measure.plain import Task, plain_encoder
from benchmarks.peers.loader import LabelledImages, Loading
from pipelines.augment.presets import Augmentation
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError
from pipelines.views import Views

DEFAULT = Loading(workers=8)  # as in its example


def require_lightly() -> None:
    """Raises BackendMissingError with the command that installs it."""
    try:
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        raise BackendMissingError(f"lightly cannot be imported ({error}): uv sync --inexact --group bench") from error


class LightlyStep:
    """`step(views)`: EMA, forward, NTXentLoss with its memory bank, backward, SGD; the loss stays on the device.

    channels_last  weights and images in channels-last layout
    dtype          autocast dtype: bfloat16, or float32 for none
    symmetric      also swap the views; the loss is the mean of both
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        *,
        symmetric: bool = False,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        backbone = plain_encoder(replace(task, bn_splits=1))
        assert isinstance(backbone.fc, nn.Linear)
        features = backbone.fc.in_features
        backbone.fc = nn.Identity()
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        encoder = nn.Sequential(backbone, MoCoProjectionHead(features, features, task.dim))
        self.query = encoder.to(device).to(memory_format=self._layout).train()
        self.key = copy.deepcopy(self.query)
        deactivate_requires_grad(self.key)
        self._update_momentum = update_momentum
        self._criterion = NTXentLoss(task.temperature, memory_bank_size=(task.queue, task.dim)).to(device)
        self._optimiser = torch.optim.SGD(
            self.query.parameters(), task.lr, momentum=task.sgd_momentum, weight_decay=task.weight_decay
        )
        self._task, self._device, self._dtype, self._symmetric = task, device, dtype, symmetric
        self._loss_sum, self._steps = torch.zeros((), device=device), 0

    def __call__(self, views: Views) -> None:
        self._update_momentum(self.query, self.key, m=self._task.ema_momentum)
        query, key = (images.to(memory_format=self._layout) for images in (views.query, views.key))
        low = self._dtype != torch.float32
        with torch.autocast(self._device.type, dtype=self._dtype) if low else nullcontext():
            loss = self._loss(query, key)
            if self._symmetric:
                loss = 0.5 * (loss + self._loss(key, query))
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._loss_sum += loss.detach()
        self._steps += 1

    def _loss(self, query: Tensor, key: Tensor) -> Tensor:
        q = self.query(query)
        with torch.no_grad():
            k = self.key(key)
        return self._criterion(q, k)

    def read_loss(self) -> float:
        """Mean since the last call."""
        mean = self._loss_sum.item() / max(1, self._steps)
        self._loss_sum.zero_()
        self._steps = 0
        return mean


def lightly_dataset(index: ImageIndex, augmentation: Augmentation, side: int) -> Dataset:
    """lightly's dataset with its two-view transform, set to the parameters of an augmentation."""
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    a = augmentation
    transform = MoCoV2Transform(
        input_size=side,
        cj_prob=a.jitter_p,
        cj_bright=a.brightness,
        cj_contrast=a.contrast,
        cj_sat=a.saturation,
        cj_hue=a.hue,
        min_scale=a.scale[0],
        random_gray_scale=a.grey_p,
        gaussian_blur=a.blur_p,
        sigmas=a.blur_sigma,
        hf_prob=a.flip_p,
        normalize={"mean": list(a.mean), "std": list(a.std)},
    )
    dataset = LightlyDataset.from_torch_dataset(LabelledImages(index), transform)
    return dataset  # type: ignore[return-value] - not a subclass of torch's Dataset
