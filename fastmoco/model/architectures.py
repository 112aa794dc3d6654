"""Names of backbones, checked without importing torch, and the families that build them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastmoco.errors import ConfigError
from fastmoco.registry import ARCHITECTURES, STEMS
from pipelines.registry import load
from pipelines.suggest import closest

if TYPE_CHECKING:
    from fastmoco.model.family import BackboneFamily


def check_architecture(arch: str | None, stem: str | None = None) -> None:
    """Raise ConfigError, with the closest name, for an unknown architecture or stem."""
    for kind, value, known in (("architecture", arch, ARCHITECTURES), ("stem", stem, STEMS)):
        if value is not None and value not in known:
            raise ConfigError(f"unknown {kind} {value!a}; did you mean {closest(value, known)}? ({', '.join(known)})")


def check_wanted(arch: str | None, stem: str | None, side: int | None) -> None:
    """Raise ConfigError for requirements that no backbone can meet."""
    check_architecture(arch, stem)
    if side is not None and side < 8:
        raise ConfigError(f"the side of a view is {side} pixels, expected 8 or more")


def family(arch: str) -> type[BackboneFamily]:
    """The family that builds an architecture. Raises ConfigError for an unknown one."""
    check_architecture(arch)
    return load(ARCHITECTURES[arch])


def identify(shapes: Mapping[str, tuple[int, ...]], arch: str | None = None) -> tuple[str, str, float]:
    """(arch, stem, width) of the backbone with tensors of exactly these names and shapes.

    arch  restricts the search to the family of this architecture; ignored if unknown

    Raises ValueError with the reason if there is none.
    """
    targets = [ARCHITECTURES[arch]] if arch in ARCHITECTURES else dict.fromkeys(ARCHITECTURES.values())
    reasons = []
    for target in targets:
        try:
            return load(target).identify(shapes)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))
