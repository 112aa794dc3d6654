"""Linear probe: a linear classifier on frozen features, trained with SGD as in the authors' `main_lincls.py`.

N images · D features · C classes · B images per step
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.errors import ConfigError
from fastmoco.evaluation.settings import Sgd
from pipelines.plan.order import epoch_order
from pipelines.transfer import to_device

INIT_STD = 0.01


def new_classifier(feature_dim: int, num_classes: int, device: torch.device, seed: int) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01²) and zero biases, as in the authors' code."""
    layer = nn.Linear(feature_dim, num_classes)
    with torch.no_grad():
        layer.weight.normal_(0, INIT_STD, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer.to(device)


def inputs(features: Tensor, sgd: Sgd) -> Tensor:
    """What the classifier sees of features (B, D): these, or with `sgd.normalize` their directions."""
    return F.normalize(features, dim=1) if sgd.normalize else features


def fit_linear(
    batches: Iterable[tuple[Tensor, Tensor]],
    steps_per_epoch: int,
    feature_dim: int,
    num_classes: int,
    sgd: Sgd,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Linear:
    """Train a linear layer with SGD on mean cross-entropy + ½ · weight_decay · (‖W‖² + ‖b‖²), as the authors do.

    batches  (features (B, D) of `dtype`, labels (B,) int64) of all epochs, on the device

    The layer is for `inputs(features, sgd)`.
    With full batches it converges to the optimum of scikit-learn's LogisticRegression with C = 1 / (N · weight_decay)
    whose bias is the weight of a constant feature (see `tests/evaluation/test_linear.py`). Raises ConfigError if the
    loss stops being finite.
    """
    layer = new_classifier(feature_dim, num_classes, device, seed).to(dtype)
    optimiser = torch.optim.SGD(layer.parameters(), lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
    loss = torch.zeros((), device=device)
    for step, (features, labels) in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = sgd.lr_at(step, steps_per_epoch)
        loss = F.cross_entropy(layer(inputs(features, sgd)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if not (loss.isfinite() & layer.weight.isfinite().all()).item():
        raise ConfigError(f"the linear probe diverged with a learning rate of {sgd.lr:g}: lower --linear-lr")
    return layer


def cached_batches(features: Tensor, labels: Tensor, sgd: Sgd, seed: int = 0) -> tuple[Iterator, int]:
    """Shuffled batches of all epochs from features in memory, and the number of batches per epoch.

    The order is a pure function of (seed, epoch); the last batch of an epoch may be smaller.
    """

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(sgd.epochs):
            order = to_device(epoch_order(seed, epoch, len(features)), features.device)
            for rows in order.split(sgd.batch_size):
                yield features[rows], labels[rows]

    return batches(), -(-len(features) // sgd.batch_size)
