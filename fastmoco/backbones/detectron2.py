"""What detectron2 calls the parts of a ResNet, and the settings that build one like ours."""

from __future__ import annotations

import re

from fastmoco.backbones.read import LoadedBackbone
from fastmoco.model.resnet import SHAPES

NAME = re.compile(
    r"(stem|res[2-5]\.\d+)\.(conv[1-3]|shortcut)(\.norm\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    r"|\.weight)"
)


def detectron2_name(name: str) -> str:
    """torchvision's name of a tensor to detectron2's: layer1.0.bn2.weight → res2.0.conv2.norm.weight."""
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = name if name.startswith("res") else "stem." + name
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def detectron2_settings(backbone: LoadedBackbone) -> dict[str, str | int | list[float]]:
    """What a config of detectron2 has to say for this backbone to be built, fed and fine-tuned as a whole.

    By default detectron2 keeps the first stages and all statistics of batch norm as they are, and has the stride in
    the first convolution of a bottleneck, unlike torchvision. FREEZE_AT 0 and a batch norm across GPUs are of the
    authors' detection/configs.
    """
    shape = SHAPES[backbone.arch]
    convolutions = 2 if shape.expansion == 1 else 3  # in a block
    return {
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": convolutions * sum(shape.layers) + 2,
        "MODEL.RESNETS.NUM_GROUPS": shape.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": shape.width_per_group,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 * shape.expansion,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.PIXEL_MEAN": [round(255 * value, 4) for value in backbone.mean],
        "MODEL.PIXEL_STD": [round(255 * value, 4) for value in backbone.std],
        "INPUT.FORMAT": "RGB",
    }
