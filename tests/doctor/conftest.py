"""What the tests of the doctor share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmoco.doctor.findings import Target


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A CPU, a folder to measure and one for scratch files."""
    (tmp_path / "scratch").mkdir()
    return Target("cpu", str(tmp_path), str(tmp_path / "scratch"))
