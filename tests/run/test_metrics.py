"""Metrics are read back as written, and a resumed run produces the file of an uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastmoco.run import appended
from fastmoco.run.metrics import MetricsWriter, read_metrics


def write_steps(writer: MetricsWriter, steps: range) -> None:
    for step in steps:
        writer.write(step, step // 10, loss=7.0 / (step + 1), lr=0.03, images_per_s=1000 + step)


def test_lines_are_read_back_and_visible_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(50, 1, loss=8.5, device_memory_bytes=2**40, knn_top1_percent=12.5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 50, "epoch": 1, "loss": 8.5, "device_memory_bytes": 2**40, "knn_top1_percent": 12.5}
    ]
    writer.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, 0, loss=math.nan, lr=math.inf, knn_top1_percent=None)
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"])
    assert math.isnan(record["lr"])


@pytest.mark.parametrize("torn", [b"", b'{"step": 16, "ep', b"\0\0\0\0", b'{"step": 16, "epoch": 1}'])
def test_a_resumed_run_produces_the_file_of_an_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    uninterrupted = MetricsWriter(tmp_path / "a", tensorboard=False)
    write_steps(uninterrupted, range(30))
    uninterrupted.close()

    path = tmp_path / "b" / "metrics.jsonl"
    killed = MetricsWriter(tmp_path / "b", tensorboard=False)
    write_steps(killed, range(16))
    killed.close()
    path.write_bytes(path.read_bytes() + torn)
    assert len(read_metrics(path)) == 16
    resumed = MetricsWriter(tmp_path / "b", tensorboard=False)
    resumed.truncate_after(9)
    write_steps(resumed, range(10, 30))
    resumed.close()
    assert path.read_bytes() == uninterrupted.path.read_bytes()


def test_a_corrupt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0}\nnot json\n{"step": 3, "epoch": 0}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    MetricsWriter(tmp_path, tensorboard=False).truncate_after(3)
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_a_full_disk_warns_and_no_line_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with monkeypatch.context() as full:
        full.setattr(appended, "open_to_append", lambda _: open("/dev/full", "ab", buffering=0))  # noqa: SIM115
        warning = writer.write(1, 0, loss=1.0)
        assert warning is not None
        assert "No space left" in warning
        with pytest.raises(OSError, match="No space left"):
            writer.close()
    assert writer.write(2, 0, loss=0.5) is None
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_has_the_same_values_and_drops_repeated_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    write_steps(writer, range(4))
    writer.truncate_after(1)
    writer.write(2, 0, loss=5.0)
    writer.write(3, 0, loss=math.nan)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 7.0), (1, 3.5), (2, 5.0)]
    assert "step" not in events.Tags()["scalars"]
