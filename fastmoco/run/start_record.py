"""start.json: what a run said at its start, its settings with their reasons, and the machine, for a later reader."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastmoco.console import Fact
from pipelines import host_memory
from pipelines.files import read_file, write_atomically
from pipelines.platforms import processor_name, usable_cpus

FILE_NAME = "start.json"


@dataclass(frozen=True)
class StartRecord:
    """What the other files of a run do not say.

    facts    the rows printed at the start: settings, and the reason for each that was not given
    machine  processor, usable cores, memory in bytes, operating system
    """

    facts: Sequence[Fact]
    machine: dict[str, Any] = field(default_factory=lambda: machine())

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
        return StartRecord(facts, content["machine"]) if isinstance(content["machine"], dict) else None
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
