"""Fine-tuning: backbone and classifier trained end to end on labelled images, from the pretrained weights.

B images per step · S side of a view · D features · C classes
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.errors import ConfigError
from fastmoco.evaluation.labelled_views import LabelledViews
from fastmoco.evaluation.linear import new_classifier
from fastmoco.evaluation.settings import Sgd

CLASSIFIER_LR_FACTOR = 10.0  # our choice: the classifier starts from random weights, the backbone does not


class Classifier(nn.Module):
    """A copy of a backbone with a linear classifier on its features: (B, 3, S, S) → (B, C)."""

    def __init__(self, backbone: nn.Module, fc: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.fc = copy.deepcopy(backbone), fc

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images).float())


def fine_tune(
    backbone: nn.Module,
    feature_dim: int,
    num_classes: int,
    views: LabelledViews,
    sgd: Sgd,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Classifier:
    """Train a copy of `backbone` with SGD on mean cross-entropy; returns it in eval mode.

    The classifier's learning rate is ten times `sgd.lr`. Weight decay applies to convolutions and to the classifier's
    weights, not to biases and batch norm. Batch norm is in training mode. `dtype` is that of autocast. Raises
    ConfigError if the loss stops being finite, DataError for an image that cannot be read.
    """
    assert views.drop_last, "batch norm needs more than one image, and the last batch may have one"
    model = Classifier(backbone, new_classifier(feature_dim, num_classes, device, seed)).to(device)
    model.requires_grad_(True).train()
    decayed = [p for p in model.backbone.parameters() if p.ndim > 1]
    not_decayed = [p for p in model.backbone.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "factor": 1.0, "weight_decay": sgd.weight_decay},
        {"params": not_decayed, "factor": 1.0},
        {"params": [model.fc.weight], "factor": CLASSIFIER_LR_FACTOR, "weight_decay": sgd.weight_decay},
        {"params": [model.fc.bias], "factor": CLASSIFIER_LR_FACTOR},
    ]
    optimiser = torch.optim.SGD(groups, lr=sgd.lr, momentum=sgd.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    loss = torch.zeros((), device=device)
    for step, (images, labels) in enumerate(views.batches(sgd.epochs)):
        lr = sgd.lr_at(step, views.steps_per_epoch)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            scores = model(images)
        loss = F.cross_entropy(scores.float(), labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        on_step()
    if not (loss.isfinite() & model.fc.weight.isfinite().all()).item():
        raise ConfigError(f"fine-tuning diverged with a learning rate of {sgd.lr:g}: lower --fine-tune-lr")
    return model.eval()
