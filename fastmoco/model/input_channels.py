"""Backbones of images with other channels than red, green and blue: only their first convolution differs."""

from __future__ import annotations

from torch import nn

from fastmoco.errors import ConfigError


def first_convolution(module: nn.Module) -> tuple[str, nn.Conv2d]:
    """The name and the module of the convolution that reads the image: the first of a backbone.

    Raises ConfigError where there is none.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            return name, part
    raise ConfigError("the backbone has no convolution whose channels could be those of the images")


def set_channels(module: nn.Module, channels: int) -> None:
    """Give a backbone a first convolution of so many input channels, with new weights (He et al. 2015, fan out).

    A backbone that has them already stays as it is. Raises ConfigError for a first convolution in groups.
    """
    name, old = first_convolution(module)
    if old.in_channels == channels:
        return
    if old.groups != 1:
        raise ConfigError(f"the first convolution is in {old.groups} groups: its {old.in_channels} channels are fixed")
    shape = channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation
    options = {"padding_mode": old.padding_mode, "device": old.weight.device, "dtype": old.weight.dtype}
    new = type(old)(*shape, bias=old.bias is not None, **options)  # pyright: ignore[reportArgumentType]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    module.set_submodule(name, new)
