"""Tables of what `benchmarks/pipelines.py` has measured."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.measure.harness import short, show


def show_speeds(console: Console, result: dict[str, Any]) -> None:
    rows = []
    for name, found in result["cases"].items():
        on_device = found.get("nvml_bytes")
        rows.append(
            (
                name,
                str(found["images_per_s"]),
                f"{found['ratio_to_control'].median:.2f}×",
                short(found["cpu_ms_per_image"].median),
                short(found["host_bytes"].median / 1e6),
                "–" if on_device is None else short(on_device.median / 1e6),
                short(result["open_s"][name]),
            )
        )
    columns = ("pipeline", "images/s", "to control", "CPU ms/image", "host MB", "device MB", "opening s")
    _show(console, result, columns, rows)


def show_slopes(console: Console, result: dict[str, Any]) -> None:
    rows = [
        (name, f"{found['slope_mb_per_epoch']:+.2f}", short(found["memory_mb"][1]), short(found["memory_mb"][-1]))
        for name, found in result["cases"].items()
    ]
    _show(console, result, ("pipeline", "MB/epoch", "MB after epoch 1", "MB after epoch 11"), rows)


def _show(console: Console, result: dict[str, Any], columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    settings, data = result["settings"], result["data"]
    note = f"{data['description']}, {data['stored_bytes'] / 1e6:,.0f} MB as stored"
    if data["stored_bytes"] / 2**30 < result["environment"]["memory_gib"] / 2:
        note += ", read from the page cache"
    rows += [(name, "not measured", *[""] * (len(columns) - 2)) for name in result["left_out"]]
    for name, reason in result["left_out"].items():
        note += f"\n{name}: {reason}"
    what = "whole views" if settings["colour"] else "uint8 crops, no colour"
    sizes = f"{settings['crop_size']} px, batch {settings['batch_size']}, {settings['workers']} workers"
    show(console, f"loader only, {what}, {sizes}", columns, rows, note)
