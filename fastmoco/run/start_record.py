"""start.json: what a run said at its start, its settings with their reasons, and the machine, for a later reader."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmoco.console import Fact
from pipelines import host_memory
from pipelines.files import read_file, write_atomically
from pipelines.platforms import processor_name, usable_cpus

if TYPE_CHECKING:  # it imports torch, which readers do not need
    from pipelines.data.index import ImageIndex

FILE_NAME = "start.json"


@dataclass(frozen=True)
class StartRecord:
    """What the other files of a run do not say.

    facts            the rows printed at the start: settings, and the reason for each that was not given
    chance_loss      the loss at chance level
    steps            of the whole run
    images, classes  of the training split; 0 classes without labels
    machine          processor, usable cores, memory in bytes, operating system
    """

    facts: Sequence[Fact]
    chance_loss: float
    steps_per_epoch: int
    steps: int
    images: int
    classes: int
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    @classmethod
    def of(
        cls, facts: Sequence[Fact], chance_loss: float, steps_per_epoch: int, steps: int, images: ImageIndex
    ) -> StartRecord:
        return cls(facts, chance_loss, steps_per_epoch, steps, len(images), len(images.class_names))

    def write(self, run: Path) -> None:
        """Write start.json. A resumed run keeps the reasons that it no longer knows. Raises OSError."""
        earlier = read_start(run)
        reasons = {} if earlier is None else {fact[:2]: fact.why for fact in earlier.facts}
        facts = [fact if fact.why else fact._replace(why=reasons.get(fact[:2], "")) for fact in self.facts]
        content = asdict(self) | {"facts": [fact._asdict() for fact in facts]}
        write_atomically(run / FILE_NAME, json.dumps(content, indent=2) + "\n")


def read_start(run: Path) -> StartRecord | None:
    """What start.json of a run holds; None for an earlier run, which has none, or one that is damaged."""
    try:
        content = json.loads(read_file(run / FILE_NAME))
        facts = [Fact(*(str(fact[name]) for name in Fact._fields)) for fact in content.pop("facts")]
        counts: list[int] = [content[name] for name in ("steps_per_epoch", "steps", "images", "classes")]
        if not all(type(count) is int for count in counts) or not isinstance(content["machine"], dict):
            return None
        return StartRecord(facts, float(content["chance_loss"]), *counts, machine=content["machine"])
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def machine() -> dict[str, Any]:
    """The processor, the cores and the memory that this process may use, and the operating system."""
    memory = None
    with suppress(OSError, KeyError):  # Linux
        memory = min([host_memory.meminfo()["MemTotal"], *(group.limit for group in host_memory.container_limits())])
    return {
        "processor": processor_name(),
        "cores": usable_cpus(),
        "all_cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(terse=True),
    }
