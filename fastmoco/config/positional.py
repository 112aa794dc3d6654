"""How values without a flag are parsed, where tyro's rule for their type does not fit."""

from __future__ import annotations

import tyro

ONE = tyro.constructors.PrimitiveConstructorSpec[tuple[str, ...]](
    nargs=1,
    metavar="DATA",
    instance_from_str=lambda values: (values[0],),
    is_instance=lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
    str_from_instance=lambda value: [", ".join(value)],
)
"""A tuple of one: `make_ffcv.py DATA OUT`, where DATA may not take OUT too."""
