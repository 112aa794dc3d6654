"""ResNets made of torchvision's own classes alone, and which of them a set of tensor shapes belongs to.

B batch · S side of a view · D features
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchvision.models import resnet

from fastmoco.model.encoder import ARCHITECTURES

Shapes = Mapping[str, tuple[int, ...]]

COUNTERS = ".num_batches_tracked"  # files from before torch 0.4.1 have none, and nothing here reads them
_CHANNELS = 64
_STEMS = {7: "imagenet", 3: "cifar"}


def plain_resnet(arch: str, stem: str, width: float) -> resnet.ResNet:
    """What `fastmoco.model.encoder` trains, as torchvision's `ResNet`: (B, 3, S, S) → (B, D), `fc` being the identity.

    The parameters have the same names and shapes, plain `BatchNorm2d` in place of the split one (in evaluation they are
    the same function), and random values.
    """
    shape = ARCHITECTURES[arch]
    block = resnet.Bottleneck if shape.block.expansion == 4 else resnet.BasicBlock
    model = resnet.ResNet(block, list(shape.layers), groups=shape.groups, width_per_group=shape.width_per_group)
    if width != 1:
        channels = model.inplanes = round(_CHANNELS * width)
        model.conv1, model.bn1 = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False), nn.BatchNorm2d(channels)
        for stage, blocks in enumerate(shape.layers):
            planes = round(_CHANNELS * 2**stage * width)
            setattr(model, f"layer{stage + 1}", model._make_layer(block, planes, blocks, stride=1 if stage == 0 else 2))
    if stem == "cifar":
        set_cifar_stem(model)
    model.fc = nn.Identity()  # type: ignore[assignment] - torchvision infers a narrower type
    return model


def set_cifar_stem(model: nn.Module) -> None:
    """Gives a ResNet of torchvision or timm a 3×3 convolution of stride 1 and no pooling, for small images."""
    channels = model.get_parameter("conv1.weight").shape[0]
    model.conv1, model.maxpool = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.Identity()


def identify(shapes: Shapes) -> tuple[str, str, float]:
    """(arch, stem, width) of the backbone that has exactly these tensors, the counters of batch norm aside.

    Raises ValueError with the reason where there is none.
    """
    first = shapes.get("conv1.weight", ())
    if len(first) != 4 or first[1] != 3 or first[2] != first[3] or first[2] not in _STEMS:
        found = f"conv1.weight is {list(first)}" if first else "there is no conv1.weight"
        raise ValueError(f"{found}, and a ResNet's is [64, 3, 7, 7], or [64, 3, 3, 3] with the CIFAR stem")
    stem, width = _STEMS[first[2]], first[0] / _CHANNELS
    if width * 8 % 1 or width > 64:
        raise ValueError(f"its first layer has {first[0]} channels, expected a multiple of 8")
    layers = tuple(_blocks(shapes, stage) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in shapes
    candidates = [
        name
        for name, shape in ARCHITECTURES.items()
        if shape.layers == layers
        and (shape.block.expansion == 4) == bottleneck
        and width * shape.width_per_group >= 1  # at least one channel a group
    ]
    if not candidates:
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(f"its stages have {layers} {kind} blocks, as none of {', '.join(ARCHITECTURES)}")
    reasons = []
    for name in candidates:
        reason = _difference(shapes, _shapes(name, stem, width))
        if reason is None:
            return name, stem, width
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"its tensors fit none of the known architectures ({'; '.join(reasons)})")


def _shapes(arch: str, stem: str, width: float) -> Shapes:
    with torch.device("meta"):  # allocates nothing
        return {name: tuple(tensor.shape) for name, tensor in plain_resnet(arch, stem, width).state_dict().items()}


def _blocks(shapes: Shapes, stage: int) -> int:
    count = 0
    while f"layer{stage}.{count}.conv1.weight" in shapes:
        count += 1
    return count


def _difference(found: Shapes, expected: Shapes) -> str | None:
    """The first difference in words; None where there is none."""
    for name, shape in expected.items():
        if name not in found:
            if not name.endswith(COUNTERS):
                return f"{name} is missing"
        elif found[name] != shape:
            return f"{name} is {list(found[name])}, expected {list(shape)}"
    surplus = next((name for name in found if name not in expected), None)
    return None if surplus is None else f"{surplus[:80]!a} is not in it"
