"""Files of tensors by name, of which only those are loaded that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from safetensors import safe_open
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    shapes        of all tensors by name; in nested dicts, the names of the dicts come first: state_dict.conv1.weight
    load          names → tensors on the CPU; raises ValueError where the file is damaged
    place         name → where the values are: the same for two names of one tensor
    texts         strings that stand beside the tensors, by name
    whole_models  classes of the whole models in it, which are not loaded
    """

    shapes: Mapping[str, Shape]
    load: Callable[[Iterable[str]], dict[str, Tensor]]
    place: Callable[[str], Hashable]
    texts: Mapping[str, str] = field(default_factory=dict)
    whole_models: tuple[str, ...] = ()


def safetensors_file(path: str) -> TensorFile:
    """A safetensors file; `texts` is its metadata. Raises OSError and SafetensorError, also from `load`."""

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}

    with safe_open(path, framework="pt", device="cpu") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        return TensorFile(shapes, load, lambda name: name, file.metadata() or {})
