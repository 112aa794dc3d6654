"""Tables and pictures of results, one section per script."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measure.harness import as_json, short
from benchmarks.measure.variants import VARIANTS
from benchmarks.reporting.cells import Cell, bar_chart, median_of, memory_mb, notes, spread, table
from benchmarks.reporting.collected import Collection, is_of
from benchmarks.reporting.headlines import BASELINE, PLAIN, data_name, describe_run, describe_task, format_ratio
from benchmarks.reporting.page import Block, Heading, Picture, Table, Text
from benchmarks.reporting.plots import curves, roofline_plot

_STATE = ("complete", "rounds", "planned_rounds", "left_out")
_CHANGES = {variant.name: variant.change for variant in VARIANTS}


def sections(collection: Collection) -> list[Block]:
    """All tables and pictures, from data loading to whole runs."""
    blocks: list[Block] = []
    for title, benchmark, section in _SECTIONS:
        if results := collection.of(benchmark):
            blocks.append(Heading(title))
            for name, result in results.items():
                blocks += section(name.replace("/", "-"), result)
    return blocks


def section(result: Mapping[str, Any]) -> list[Block]:
    """The section of one result, as a script has it before it is written."""
    for title, benchmark, section in _SECTIONS:
        if is_of(result, benchmark):
            return [Heading(title), *section(result["benchmark"], as_json(result))]
    raise ValueError(f"no section shows results of {result['benchmark']}")


def _pipelines(name: str, result: dict[str, Any]) -> Iterator[Block]:
    settings, cases = result["settings"], result["cases"]
    output = "whole views" if settings["colour"] else "uint8 crops, no colour"
    yield Heading(f"{output}, {settings['crop_size']} px, batch {settings['batch_size']}, {data_name(result)}", 3)
    if any("slope_mb_per_epoch" in case for case in cases.values()):  # of --slope
        columns = {
            "MB/epoch": lambda case: f"{case['slope_mb_per_epoch']:+.2f}",
            "MB after epoch 1": lambda case: short(case["memory_mb"][1]),
            "MB at the end": lambda case: short(case["memory_mb"][-1]),
        }
        yield table("pipeline", cases, columns)
        yield from notes(result)
        return
    columns = {
        "images/s": lambda case: spread(case["images_per_s"]),
        "vs DataLoader": lambda case: format_ratio(case["ratio_to_control"]),
        "CPU ms/image": median_of("cpu_ms_per_image"),
        "host MB": median_of("host_bytes", 1e-6),
        "GPU MB": median_of("nvml_bytes", 1e-6),
    }
    yield table("pipeline", cases, columns)
    yield from bar_chart(name, cases, BASELINE, f"data loading only, {output}")
    yield from notes(result)


def _step(name: str, result: dict[str, Any]) -> Iterator[Block]:
    variants, task = result["rungs"], result["task"]
    yield Heading(f"{describe_task(task)}, queue {task['queue']:,}, {task['bn_splits']} BN splits", 3)
    columns = {
        "change": lambda variant: variant["change"],
        "images/s": lambda variant: spread(variant["images_per_s"]),
        "vs plain": lambda variant: format_ratio(variant["ratio_to_plain"]),
        "ms": median_of("ms"),
        "TFLOP/s": lambda variant: short(variant["tflop_per_s"]),
        "format": lambda variant: variant.get("format", ""),
        "of peak": lambda variant: (
            "–" if variant["share_of_roofline"] is None else f"{variant['share_of_roofline']:.0%}"
        ),
        "peak MB": lambda variant: memory_mb(variant["memory"]),
        "warm-up s": lambda variant: short(variant["warm_up_s"]),
    }
    yield table("step", {n: v | {"change": _CHANGES.get(n, "")} for n, v in variants.items()}, columns)
    yield from bar_chart(name, variants, PLAIN, "the training step alone, one change per bar")
    peaks = dict(result.get("peaks_tflop_per_s", {}))
    if "roofline_tflop_per_s" in result:  # of an earlier version: the product in the 16-bit dtype for all variants
        peaks[result["dtype"]] = result["roofline_tflop_per_s"]
    if peaks:
        products = ", ".join(f"{spread(peak)} in {name}" for name, peak in peaks.items())
        yield Text(f"Peak: TFLOP/s of a matrix product, {products}; a step has {result['step_flops']:.3g} FLOPs.")
    yield from _memory(result)
    yield from notes(result)


def _memory(result: dict[str, Any]) -> Iterator[Block]:
    """Memory of a step on a GPU, of every variant."""
    variants, task = result["rungs"], result["task"]
    plain = variants.get(PLAIN, {}).get("memory", {}).get("peak_allocated_bytes")
    variants = {name: variant for name, variant in variants.items() if "peak_allocated_bytes" in variant["memory"]}
    if not variants:
        return
    yield Heading(f"memory of the step, {describe_task(task)}, queue {task['queue']:,}", 3)
    columns: dict[str, Cell] = {
        "peak MB of tensors": lambda variant: short(variant["memory"]["peak_allocated_bytes"] / 1e6),
        "of plain": lambda variant: "" if not plain else f"{variant['memory']['peak_allocated_bytes'] / plain:.0%}",
        "MB reserved": lambda variant: short(variant["memory"]["reserved_bytes"] / 1e6),
        "MB of the GPU": lambda variant: short(variant["memory"].get("nvml_bytes", 0.0) / 1e6),
    }
    yield table("step", variants, columns)


def _train(name: str, result: dict[str, Any]) -> Iterator[Block]:
    cases, step = result["cases"], result["step"]
    yield Heading(f"{describe_task(result['task'])}, {data_name(result)}", 3)
    yield Text("Our step: " + ", ".join(f"{key} {value}" for key, value in step.items()) + ".")
    columns = {
        "images/s": lambda case: spread(case["images_per_s"]),
        "vs plain": lambda case: format_ratio(case.get("ratio_to_plain")),
        "of the step alone": lambda case: (
            f"{case['share_of_step_only']['median']:.1%}" if "share_of_step_only" in case else "–"
        ),
        "data wait %": median_of("data_wait_percent"),
        "CPU ms/image": median_of("cpu_ms_per_image"),
        "host MB": median_of("host_bytes", 1e-6),
        "GPU MB": median_of("nvml_bytes", 1e-6),
        "GPU busy %": median_of("gpu_utilisation_percent"),
        "W": median_of("power_w"),
        "J/image": median_of("joules_per_image"),
        "bottleneck": lambda case: case.get("bottleneck", "–"),
    }
    labels = {"ours": "step alone", "plain": "plain step alone"}
    cases = {labels[key]: alone for key, alone in result["step_only"].items()} | cases
    yield table("pipeline", cases, columns)
    yield from bar_chart(name, cases, PLAIN, "end to end from files, and the step alone")
    yield from notes(result)


def _peers(name: str, result: dict[str, Any]) -> Iterator[Block]:
    rows = {row: result["rows"][row] | {"name": row} for row in result["rows"]}
    yield Heading(f"{describe_task(result['task'])}, {data_name(result)}", 3)
    columns: dict[str, Cell] = {
        "settings": lambda row: row["terms"],
        "images/s": lambda row: spread(row["images_per_s"]),
    }
    for ours, by_peer in result["ratios"].items():
        columns[f"{ours} is"] = lambda row, by_peer=by_peer: format_ratio(by_peer.get(row["name"]))
    columns |= {
        "data wait %": median_of("data_wait_percent"),
        "CPU ms/image": median_of("cpu_ms_per_image"),
        "host MB": median_of("host_bytes", 1e-6),
        "GPU MB": median_of("nvml_bytes", 1e-6),
        "opening s": lambda row: short(row["open_s"]),
    }
    yield table("trainer", rows, columns)
    yield from bar_chart(name, rows, "", "end to end from the same files")
    yield from notes(result)


def _accuracy(name: str, result: dict[str, Any]) -> Iterator[Block]:
    for recipe, of_recipe in result["recipes"].items():
        runs, targets = of_recipe["runs"], of_recipe["targets"]
        config = next((run["config"] for run in runs.values() if "config" in run), None)
        yield Heading(f"{describe_run(recipe, config)}, batch {config['batch_size']}" if config else recipe, 3)
        rows = [(seed, *(_when(target, seed) for target in targets), *_run_cells(run)) for seed, run in runs.items()]
        if len(runs) > 1:
            rows.append(("median", *map(_median_time, targets), *[""] * 6))
        columns = ("seed", *(f"to {target['percent']:g} %" for target in targets), "best kNN", "final kNN")
        yield Table((*columns, "training min", "wall min", "images/s", "state"), rows)
        lines = {f"seed {seed}": [(e[1], e[2]) for e in run["evaluations"]] for seed, run in runs.items()}
        if lines := {label: points for label, points in lines.items() if points}:
            svg = curves(lines, [t["percent"] for t in targets], "training minutes", "kNN top-1, %")
            caption = "kNN accuracy over training minutes, without evaluations; targets dashed"
            yield Picture(f"{name}-{recipe}", svg, caption)
    for run, why in result.get("left_out", {}).items():
        yield Text(f"Failed: {run} ({why}).")


def _when(target: dict[str, Any], seed: str) -> str:
    minutes = target["training_minutes"][seed]
    return "not reached" if minutes is None else f"{short(minutes)} min, epoch {target['epochs'][seed]:g}"


def _median_time(target: dict[str, Any]) -> str:
    minutes = list(target["training_minutes"].values())
    if missed := minutes.count(None):
        return f"not by {missed} of {len(minutes)}"
    return f"{short(statistics.median(minutes))} min"


def _run_cells(run: dict[str, Any]) -> list[str]:
    percents = (f"{run[key]:.1f} %" if run[key] is not None else "–" for key in ("best_percent", "final_percent"))
    numbers = (run.get(key) for key in ("training_minutes", "wall_minutes", "images_per_s"))
    return [*percents, *("–" if number is None else short(number) for number in numbers), run["state"]]


def _scaling(name: str, result: dict[str, Any]) -> Iterator[Block]:
    for axis_name, axis in result["axes"].items():
        yield Heading(f"with {axis_name}, from {describe_task(result['task'])}, queue {result['task']['queue']:,}", 3)
        last: dict[str, Cell] = {"MB": memory_mb}
        if all("efficiency" in row for row in axis["rows"]):
            last = {"efficiency": lambda row: f"{row['efficiency']['median']:.2f}", "MB sent (lower bound)": _sent}
        rows = [
            (
                row["case"],
                f"{row['point']:,}",
                short(row["step_ms"]["median"]),
                spread(row["images_per_s"]),
                format_ratio(row["ratio_to_first"]),
                *(cell(row) for cell in last.values()),
            )
            for row in axis["rows"]
        ]
        yield Table(("case", axis["label"], "ms/batch", "images/s", f"{axis['grows']} vs first", *last), rows)
        yield from notes(axis)
    yield from notes({key: result[key] for key in _STATE if key in result})


def _neighbours(name: str, result: dict[str, Any]) -> Iterator[Block]:
    yield Heading(describe_task(result["task"]), 3)
    rows = [
        (
            f"{row['pipeline']}, {row['threads']}",
            str(row["neighbours"]),
            spread(row["images_per_s"]),
            short(row["used_threads"]["median"]),
            f"{row['kept']['median']:.0%}",
            format_ratio(row["to_fixed"]),
            "–" if row["to_idle_fixed"] is None else f"{row['to_idle_fixed']['median']:.0%}",
        )
        for row in result["rows"]
    ]
    columns = ("pipeline, threads", "busy processes", "images/s", "final threads", "of idle", "vs fixed")
    yield Table((*columns, "of idle, fixed"), rows)
    yield from notes(result)


def _roofline(name: str, result: dict[str, Any]) -> Iterator[Block]:
    ceilings = result["ceilings"]
    units = {n: ("GB/s", 1e-9) if n == "copy" else ("TFLOP/s", 1e-12) for n in ceilings}
    medians = (f"{n} {short(c['median'] * units[n][1])} {units[n][0]}" for n, c in ceilings.items())
    yield Text("Measured ceilings: " + ", ".join(medians) + ".")
    for step in result["steps"]:
        whole = step["formats"][step["main_format"]]
        yield Heading(f"{describe_task(step['task'])}, in {step['main_format']}", 3)
        points = [
            (
                p["name"],
                p["format"],
                short(p["images_per_s"]),
                short(p["flop_per_s"] / 1e12),
                f"{p['share_of_roof']:.0%}",
            )
            for p in step["points"]
        ]
        yield Table(("measured", "format", "images/s", "TFLOP/s", "of the roofline"), points)
        svg = roofline_plot(step, {n: ceiling["median"] for n, ceiling in ceilings.items()})
        caption = "hollow: upper bounds of layer groups; filled: measured rates, with their share of the roofline"
        yield Picture(f"roofline-{step['name']}", svg, caption)
        groups = [
            (
                n,
                short(group["flops"] / 1e9),
                short(group["bytes"] / 1e6),
                short(group["intensity"]),
                short(1e3 * group["seconds"]),
                f"{group['seconds'] / whole['seconds']:.0%}",
                group["bound"],
            )
            for n, group in [*whole["groups"].items(), ("whole step", whole)]
        ]
        yield Table(("kernels", "GFLOP", "MB", "FLOP/byte", "minimum ms", "share", "bound by"), groups)
    yield from notes({key: result[key] for key in _STATE if key in result})


def _sent(row: Mapping[str, Any]) -> str:
    """MB sent per rank and step, and the lower bound."""
    counted = f"{row['sent_bytes']['median'] / 1e6:.2f}" if "sent_bytes" in row else "not counted"
    return f"{counted} ({row['least_bytes']['median'] / 1e6:.2f})"


_SECTIONS: Sequence[tuple[str, str, Callable[[str, dict[str, Any]], Iterator[Block]]]] = (
    ("Data loading only", "pipelines", _pipelines),
    ("Training step alone", "step", _step),
    ("End to end", "train", _train),
    ("Other trainers", "peers", _peers),
    ("Time to accuracy", "accuracy", _accuracy),
    ("Scaling", "scaling", _scaling),
    ("Beside busy processes", "neighbours", _neighbours),
    ("Roofline", "roofline", _roofline),
)
