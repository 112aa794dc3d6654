"""What a backbone may be asked to be: names that are known before torch is loaded."""

from __future__ import annotations

from typing import get_args

from fastmoco.config import Arch
from fastmoco.config.checks import nearest
from fastmoco.errors import ConfigError

NAMES: tuple[str, ...] = get_args(Arch)
STEMS = ("imagenet", "cifar")


def check_wanted(arch: str | None, stem: str | None, side: int | None) -> None:
    """Refuse, with the nearest name, what no backbone is. Raises ConfigError."""
    for what, value, known in (("architecture", arch, NAMES), ("stem", stem, STEMS)):
        if value is not None and value not in known:
            raise ConfigError(f"unknown {what} {value!a}; did you mean {nearest(value, known)}? ({', '.join(known)})")
    if side is not None and side < 8:
        raise ConfigError(f"the side of a view is {side} pixels, expected 8 or more")
