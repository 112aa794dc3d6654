"""Names of backbones, checked without importing torch, and the families that build them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.registry import ARCHITECTURES, FAMILIES, STEMS, TIMM_PREFIX
from pipelines.errors import how_to_install
from pipelines.registry import load
from pipelines.suggest import closest

if TYPE_CHECKING:
    from fastmoco.model.family import BackboneFamily, NamedFamily


def check_architecture(arch: str | None, stem: str | None = None) -> None:
    """Raise ConfigError, with the closest name, for an unknown architecture or stem."""
    for kind, value, known in (("architecture", arch, ARCHITECTURES), ("stem", stem, STEMS)):
        if value is None or value in known or (kind == "architecture" and _prefix(value)):
            continue
        more = ", timm/NAME" if kind == "architecture" else ""
        raise ConfigError(f"unknown {kind} {value!a}; did you mean {closest(value, known)}? ({', '.join(known)}{more})")


def check_wanted(arch: str | None, stem: str | None, side: int | None) -> None:
    """Raise ConfigError for requirements that no backbone can meet."""
    check_architecture(arch, stem)
    if side is not None and side < 8:
        raise ConfigError(f"the side of a view is {side} pixels, expected 8 or more")


def named_family(arch: str | None) -> type[NamedFamily] | None:
    """The family of an architecture with a prefix, such as timm/NAME; None for the others."""
    prefix = _prefix(arch)
    return load(FAMILIES[prefix]) if prefix else None


def is_named(arch: str | None) -> bool:
    """Whether it is a backbone of `fastmoco.registry.FAMILIES`, such as timm/NAME."""
    return bool(_prefix(arch))


def check_installed(arch: str | None) -> None:
    """Raise BackendMissingError if timm is needed and not installed, without importing it."""
    if _prefix(arch) == TIMM_PREFIX and importlib.util.find_spec("timm") is None:
        raise BackendMissingError(
            f"--arch {arch} needs timm, which is not installed: {how_to_install('timm')} in a checkout, or pip install "
            "timm"
        )


def check_available(arch: str | None) -> None:
    """Raise ConfigError or BackendMissingError for a backbone of others that cannot be built here."""
    if (named := named_family(arch)) is not None:
        assert arch is not None
        named.check(arch)


def family(arch: str) -> type[BackboneFamily] | type[NamedFamily]:
    """The family that builds an architecture. Raises ConfigError for an unknown one."""
    check_architecture(arch)
    return named_family(arch) or load(ARCHITECTURES[arch])


def identify(shapes: Mapping[str, tuple[int, ...]], arch: str | None = None) -> tuple[str, str, float]:
    """(arch, stem, width) of the backbone with tensors of exactly these names and shapes.

    arch  restricts the search to the family of this architecture, or to timm/NAME itself; ignored if unknown

    Raises ValueError with the reason if there is none.
    """
    if arch is not None and (named := named_family(arch)) is not None:
        if (reason := named.layout(arch).difference(shapes)) is not None:
            raise ValueError(f"its tensors are not those of {arch}: {reason}")
        return arch, STEMS[0], 1.0
    targets = [ARCHITECTURES[arch]] if arch in ARCHITECTURES else dict.fromkeys(ARCHITECTURES.values())
    reasons = []
    for target in targets:
        try:
            return load(target).identify(shapes)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def _prefix(arch: str | None) -> str:
    """`timm/` of `timm/resnet18`; empty for names without a family of their own."""
    return next((prefix for prefix in FAMILIES if arch and arch.startswith(prefix) and arch != prefix), "")
