"""The interface of a family of backbones.

B batch · S side of a view · D features
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
"""Names of tensors → their shapes."""

COUNTERS = ".num_batches_tracked"  # of batch norm: missing in files from before torch 0.4.1, and not used here

NormLayer = Callable[[int], nn.Module]
"""Number of channels → normalisation layer."""


class BackboneFamily(Protocol):
    """The architectures of one module, registered in `fastmoco.registry.ARCHITECTURES`.

    A backbone maps (B, 3, S, S) images to (B, D) features. Its batch norm layers come from `norm_layer`, in training
    `batchnorm.split.SplitBatchNorm2d`, whose groups, ranks and kernels are set afterwards. A backbone with an attribute
    `checkpoint_activations` supports --checkpoint-activations.
    """

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        """Build a backbone with random weights from torch's global generator.

        norm_layer  None for inference and export: plain `nn.BatchNorm2d`, with the same names and shapes

        Raises ConfigError for a width or stem that cannot be built.
        """
        ...

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        """D, the number of features."""
        ...

    @staticmethod
    def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, float]:
        """(arch, stem, width) of the backbone of this family with exactly these tensors, apart from COUNTERS.

        Raises ValueError with the reason if there is none.
        """
        ...


class NamedFamily(Protocol):
    """The backbones of all names with a prefix, registered in `fastmoco.registry.FAMILIES`; `arch` has the prefix.

    They are built by other hands: width is 1 and stem "imagenet", which says nothing of them.
    """

    @staticmethod
    def check(arch: str) -> None:
        """Raise ConfigError or BackendMissingError with the reason if this one cannot be built."""
        ...

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        """As in `BackboneFamily`; the batch norm of the model is replaced by `norm_layer` (`batchnorm.convert`)."""
        ...

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        """D, the number of features."""
        ...

    @staticmethod
    def layout(arch: str) -> Layout:
        """The tensors that files of this backbone have."""
        ...

    @staticmethod
    def settings(arch: str) -> ModelSettings | None:
        """What is known of its use; None for a model that nothing is known of."""
        ...


class ModelSettings(NamedTuple):
    """What the library of a model says of it.

    side       S in pixels that the library uses it with
    mean, std  of red, green and blue, of values from 0 to 1
    reduction  pixels of a view to one of the last feature map; None where it is not known
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    reduction: int | None


class Layout(NamedTuple):
    """Tensors of a backbone of a `NamedFamily`.

    shapes     of its state dict
    constants  names of its buffers that are not in its state dict, since they follow from the architecture
    head       names that begin with one of these are of its classifier
    first      weight of its first convolution, whose input channels are those of the images
    """

    shapes: Shapes
    constants: frozenset[str] = frozenset()
    head: tuple[str, ...] = ()
    first: str = ""

    def difference(self, actual: Shapes) -> str | None:
        """The first difference of the tensors of a backbone from these, or None; for images of any channels."""
        expected, first = dict(self.shapes), actual.get(self.first, ())
        if len(first) == 4:
            expected[self.first] = (expected[self.first][0], first[1], *expected[self.first][2:])
        return difference({name: shape for name, shape in actual.items() if name not in self.constants}, expected)


def layout_of(module: nn.Module, head: tuple[str, ...] = ()) -> Layout:
    """The layout of a module."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    convolutions = (name for name, part in module.named_modules() if isinstance(part, nn.Conv2d))
    first = f"{next(convolutions, '')}.weight"
    return Layout(shapes, frozenset(name for name, _ in module.named_buffers() if name not in shapes), head, first)


def difference(actual: Shapes, expected: Shapes) -> str | None:
    """The first difference between the tensors of two backbones, or None; COUNTERS may be missing."""
    for name, shape in expected.items():
        if name not in actual:
            if not name.endswith(COUNTERS):
                return f"{name} is missing"
        elif actual[name] != shape:
            return f"{name} is {list(actual[name])}, expected {list(shape)}"
    surplus = next((name for name in actual if name not in expected), None)
    return None if surplus is None else f"{surplus[:80]!a} is unexpected"
