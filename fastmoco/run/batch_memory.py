"""What `--batch-size auto` measured: printed at the start of a run, and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fastmoco.console import Fact

FILE_NAME = "batch_size.json"


@dataclass(frozen=True)
class BatchMemory:
    """batch         images of a step over all devices: the choice
    images        of a step on one device
    budget_bytes  that a step may take
    curve         images of one device → peak bytes of a step, of all that were tried and ran
    limit         why no larger batch was tried; empty if the memory was the limit
    """

    batch: int
    images: int
    budget_bytes: int
    curve: Mapping[int, int]
    limit: str = ""

    @property
    def reason(self) -> str:
        if not self.limit:
            return f"the largest whose step fits into {self.budget_bytes / 2**30:.1f} GiB"
        return f"fits, and larger ones are not tried: {self.limit}"

    def facts(self) -> list[Fact]:
        """The memory curve, one line a measurement."""
        return [
            Fact(f"{used / 2**30:.2f} GiB", f"{count:,} images", "chosen" if count == self.images else "")
            for count, used in sorted(self.curve.items())
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"
