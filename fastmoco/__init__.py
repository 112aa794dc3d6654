"""Momentum Contrast (MoCo) pretraining as fast as the hardware allows.

    from fastmoco import Run, embed, evaluate, export, load_backbone, open_images, train

`help(fastmoco.train)` and so on explain each of them, with examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmoco.api.functions import embed, evaluate, export, load_backbone, train
    from fastmoco.api.images import open_images
    from fastmoco.api.run import Run

__all__ = ["Run", "embed", "evaluate", "export", "load_backbone", "open_images", "train"]

_MODULES = {"Run": "run", "open_images": "images"}


def __getattr__(name: str) -> Any:
    """What is public is imported when it is first used, since torch takes seconds (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"fastmoco.api.{_MODULES.get(name, 'functions')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
