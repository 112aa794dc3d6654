"""A backbone as ONNX: images (B, C, S, S) → features (B, D), for any batch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastmoco.backbones.description import RECORD
from fastmoco.backbones.read import LoadedBackbone, record
from pipelines.errors import BackendMissingError, how_to_install

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(backbone: LoadedBackbone, name: str) -> bytes:
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendMissingError(
            f"--to onnx needs {', '.join(missing)}, which is not installed: {how_to_install('onnx')}, or "
            f"pip install {' '.join(_PACKAGES)}"
        )
    side = backbone.side
    example = torch.zeros(2, backbone.channels, side, side)  # an axis of 1 would become a constant
    program = torch.onnx.export(
        backbone.module,
        (example,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[RECORD] = record(backbone)
    return program.model_proto.SerializeToString()


def load_onnx(backbone: LoadedBackbone, path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images, features = session.get_inputs()[0], session.get_outputs()[0]
    assert (images.name, features.name) == ("images", "features")
    assert images.shape[1:] == [backbone.channels, backbone.side, backbone.side]

    def model(x: Tensor) -> Tensor:
        halves = [session.run(["features"], {"images": part.numpy()})[0] for part in x.split([len(x) - 1, 1])]
        return torch.cat([torch.from_numpy(half) for half in halves])  # two sizes of batch

    return model, f"onnxruntime {importlib.metadata.version('onnxruntime')}"
