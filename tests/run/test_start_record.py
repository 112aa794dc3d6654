"""start.json: what a run said at its start survives a resume, and damage is as if it were absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmoco.console import Fact
from fastmoco.run.start_record import FILE_NAME, StartRecord, machine, read_start


def record(*facts: Fact) -> StartRecord:
    return StartRecord(facts)


def test_a_resumed_run_keeps_the_reasons_of_unchanged_settings(tmp_path: Path) -> None:
    record(Fact("queue", "512 keys", "as in the recipe"), Fact("lr", "0.03", "scaled to 16")).write(tmp_path)
    record(Fact("queue", "512 keys"), Fact("lr", "0.06")).write(tmp_path)
    start = read_start(tmp_path)
    assert start is not None
    assert start.facts == [Fact("queue", "512 keys", "as in the recipe"), Fact("lr", "0.06", "")]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"facts": []}', "[" * 100_000, "\udcff"])
def test_a_damaged_file_is_no_record(tmp_path: Path, text: str) -> None:
    assert read_start(tmp_path) is None
    (tmp_path / FILE_NAME).write_bytes(text.encode(errors="surrogateescape"))
    assert read_start(tmp_path) is None


@pytest.mark.parametrize("change", [{"facts": [{"name": "x"}]}, {"facts": 3}, {"machine": 3}])
def test_a_record_with_other_types_is_none(tmp_path: Path, change: dict) -> None:
    record().write(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text()) | change
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    assert read_start(tmp_path) is None


def test_the_machine_has_a_processor_and_cores() -> None:
    found = machine()
    assert found["processor"]
    assert 1 <= found["cores"] <= found["all_cores"]
