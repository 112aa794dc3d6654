"""Results as tables and pictures, a section for every script that has left any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measure.harness import short
from benchmarks.measure.ladder import LADDER
from benchmarks.reporting.collected import Collection
from benchmarks.reporting.headlines import CONTROL, PLAIN, data_words, peer_words, run_words, task_words, times
from benchmarks.reporting.page import Block, Heading, Picture, Table, Text
from benchmarks.reporting.plots import bars, curves, roofline_picture

_CHANGES = {rung.name: rung.change for rung in LADDER}
_MEMORY = ("nvml_bytes", "peak_allocated_bytes", "reserved_bytes", "peak_resident_bytes", "host_bytes")


def sections(collection: Collection) -> list[Block]:
    """Every table and picture, in the order from the images to the whole training."""
    blocks: list[Block] = []
    for title, benchmark, one in _SECTIONS:
        if found := collection.of(benchmark):
            blocks.append(Heading(title))
            for name, result in found.items():
                blocks += one(name.replace("/", "-"), result)
    return blocks


def _pipelines(name: str, result: dict[str, Any]) -> Iterator[Block]:
    settings, cases = result["settings"], result["cases"]
    what = "whole views" if settings["colour"] else "uint8 crops, no colour"
    yield Heading(f"{what}, {settings['crop_size']} px, batch {settings['batch_size']}, {data_words(result)}", 3)
    if "images_per_s" not in cases[CONTROL]:  # how memory grows, not how fast it is
        yield Table(("pipeline", "MB/epoch"), [(n, f"{case['slope_mb_per_epoch']:+.2f}") for n, case in cases.items()])
        return
    columns = {
        "images/s": lambda case: spread(case["images_per_s"]),
        "to the plain DataLoader": lambda case: times(case["ratio_to_control"]),
        "CPU ms/image": _middle("cpu_ms_per_image"),
        "host MB": _middle("host_bytes", 1e-6),
        "GPU MB": _middle("nvml_bytes", 1e-6),
    }
    yield _table("pipeline", cases, columns)
    yield _bars(name, cases, "images/s", CONTROL, f"data loading only, {what}")
    yield from _notes(result)


def _step(name: str, result: dict[str, Any]) -> Iterator[Block]:
    rungs = result["rungs"]
    yield Heading(f"{task_words(result['task'])}, queue {result['task']['queue']:,}", 3)
    columns = {
        "what": lambda rung: rung["change"],
        "images/s": lambda rung: spread(rung["images_per_s"]),
        "to plain": lambda rung: times(rung["ratio_to_plain"]),
        "ms": _middle("ms"),
        "TFLOP/s": lambda rung: short(rung["tflop_per_s"]),
        "of a product": lambda rung: f"{rung['share_of_roofline']:.0%}",
        "peak MB": lambda rung: _memory(rung["memory"]),
        "warm-up s": lambda rung: short(rung["warm_up_s"]),
    }
    named = {n: rung | {"change": _CHANGES.get(n, "")} for n, rung in rungs.items()}
    yield _table("step", named, columns)
    yield _bars(name, rungs, "images/s", "plain", "the training step alone, one change a bar")
    yield from _notes(result)


def _train(name: str, result: dict[str, Any]) -> Iterator[Block]:
    cases, amp = result["cases"], result["step"]
    yield Heading(f"{task_words(result['task'])}, {data_words(result)}", 3)
    yield Text("Our step: " + ", ".join(f"{key} {value}" for key, value in amp.items()) + ".")
    columns = {
        "images/s": lambda case: spread(case["images_per_s"]),
        "to plain": lambda case: times(case.get("ratio_to_plain")),
        "of the step alone": lambda case: f"{case['share_of_step_only']['median']:.1%}",
        "data wait %": _middle("data_wait_percent"),
        "CPU ms/image": _middle("cpu_ms_per_image"),
        "host MB": _middle("host_bytes", 1e-6),
        "GPU MB": _middle("nvml_bytes", 1e-6),
        "GPU busy %": _middle("gpu_utilisation_percent"),
        "W": _middle("power_w"),
        "J/image": _middle("joules_per_image"),
        "bottleneck": lambda case: case["bottleneck"],
    }
    yield _table("pipeline", cases, columns)
    alone = {"ours": "step alone", "plain": "plain step alone"}
    everything = {alone[key]: one for key, one in result["step_only"].items()} | cases
    yield _bars(name, everything, "images/s", PLAIN, "end to end from files, and the step alone")
    yield from _notes(result)


def _peers(name: str, result: dict[str, Any]) -> Iterator[Block]:
    rows = result["rows"]
    yield Heading(f"{task_words(result['task'])}, {data_words(result)}", 3)
    named = {peer_words(n): row for n, row in rows.items()}
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "with": lambda row: row["terms"],
        "images/s": lambda row: spread(row["images_per_s"]),
    }
    for ours, by_peer in result["ratios"].items():
        described = {peer_words(peer): times(ratio) for peer, ratio in by_peer.items()}
        for peer, row in named.items():
            row[f"times {ours}"] = described.get(peer, "–")
        columns[f"`{ours}` is"] = lambda row, ours=ours: row[f"times {ours}"]
    columns |= {
        "data wait %": _middle("data_wait_percent"),
        "CPU ms/image": _middle("cpu_ms_per_image"),
        "host MB": _middle("host_bytes", 1e-6),
        "GPU MB": _middle("nvml_bytes", 1e-6),
    }
    yield _table("", named, columns)
    yield _bars(name, named, "images/s", "", "end to end from the same files")
    yield from _notes(result)


def _accuracy(name: str, result: dict[str, Any]) -> Iterator[Block]:
    for recipe, one in result["recipes"].items():
        runs = {seed: run for seed, run in one["runs"].items() if run["evaluations"]}
        if not runs:
            continue
        config = next(iter(runs.values()))["config"]
        yield Heading(f"{run_words(recipe, config)}, batch {config['batch_size']}", 3)
        rows = []
        for seed, run in runs.items():
            reached = [(target["training_minutes"][seed], target["epochs"][seed]) for target in one["targets"]]
            when = ("not reached" if m is None else f"{short(m)} min, epoch {epoch:g}" for m, epoch in reached)
            best, rate = f"{run['best_percent']:.1f} %", run["images_per_s"]
            minutes = (short(run["training_minutes"]), short(run["wall_minutes"]))
            rows.append((seed, *when, best, *minutes, "–" if rate is None else short(rate), run["state"]))
        targets = (f"to {target['percent']:g} %" for target in one["targets"])
        yield Table(("seed", *targets, "best kNN", "training min", "wall min", "images/s", "state"), rows)
        lines = {f"seed {seed}": [(e[1], e[2]) for e in run["evaluations"]] for seed, run in runs.items()}
        svg = curves(lines, [t["percent"] for t in one["targets"]], "minutes of training", "kNN top-1, %")
        caption = "kNN accuracy over minutes of training, evaluations left out; dashed: targets"
        yield Picture(f"{name}-{recipe}", svg, caption)


def _scaling(name: str, result: dict[str, Any]) -> Iterator[Block]:
    for axis_name, axis in result["axes"].items():
        yield Heading(f"with {axis_name}, from {task_words(result['task'])}, queue {result['task']['queue']:,}", 3)
        last: dict[str, Callable[[dict[str, Any]], str]] = {"MB": _memory}
        if all("efficiency" in row for row in axis["rows"]):
            last = {"efficiency": lambda row: f"{row['efficiency']['median']:.2f}", "MB sent (least)": _sent}
        rows = [
            (
                row["case"],
                f"{row['point']:,}",
                short(row["step_ms"]["median"]),
                spread(row["images_per_s"]),
                times(row["ratio_to_first"]),
                *(cell(row) for cell in last.values()),
            )
            for row in axis["rows"]
        ]
        yield Table(("case", axis["label"], "ms a batch", "images/s", f"{axis['grows']} to first", *last), rows)
        yield from _notes(axis)


def _neighbours(name: str, result: dict[str, Any]) -> Iterator[Block]:
    yield Heading(task_words(result["task"]), 3)
    rows = [
        (
            f"{row['pipeline']}, {row['threads']}",
            str(row["neighbours"]),
            spread(row["images_per_s"]),
            short(row["used_threads"]["median"]),
            f"{row['kept']['median']:.0%}",
            times(row["to_fixed"]),
            "–" if row["to_idle_fixed"] is None else f"{row['to_idle_fixed']['median']:.0%}",
        )
        for row in result["rows"]
    ]
    columns = ("pipeline, threads", "busy processes", "images/s", "threads at the end", "kept", "to fixed")
    yield Table((*columns, "of fixed, idle"), rows)
    yield from _notes(result)


def _roofline(name: str, result: dict[str, Any]) -> Iterator[Block]:
    ceilings = result["ceilings"]
    units = {n: ("GB/s", 1e-9) if n == "copy" else ("TFLOP/s", 1e-12) for n in ceilings}
    rows = [(n, short(c["median"] * units[n][1]), units[n][0]) for n, c in ceilings.items()]
    yield Text("Ceilings measured here: " + ", ".join(f"{n} {value} {unit}" for n, value, unit in rows) + ".")
    for step in result["steps"]:
        form = step["formats"][step["main_format"]]
        yield Heading(f"{task_words(step['task'])}, in {step['main_format']}", 3)
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
        medians = {n: c["median"] for n, c in ceilings.items()}
        caption = "hollow: what layer groups can reach; filled: what was measured, and its share of the roofline"
        yield Picture(f"roofline-{step['name']}", roofline_picture(step, medians), caption)
        groups = [
            (
                n,
                short(group["flops"] / 1e9),
                short(group["bytes"] / 1e6),
                short(group["intensity"]),
                short(1e3 * group["seconds"]),
                f"{group['seconds'] / form['seconds']:.0%}",
                group["bound"],
            )
            for n, group in [*form["groups"].items(), ("whole step", form)]
        ]
        yield Table(("kernels", "GFLOP", "MB", "FLOP/byte", "at least ms", "share", "bound by"), groups)


_SECTIONS: Sequence[tuple[str, str, Callable[[str, dict[str, Any]], Iterator[Block]]]] = (
    ("Data loading only", "pipelines", _pipelines),
    ("The training step alone", "step", _step),
    ("End to end", "train", _train),
    ("Beside the peers", "peers", _peers),
    ("Time to accuracy", "accuracy", _accuracy),
    ("How cost grows", "scaling", _scaling),
    ("Beside busy processes", "neighbours", _neighbours),
    ("Under the roofline", "roofline", _roofline),
)


def spread(summary: Mapping[str, Any]) -> str:
    """Median and quartiles."""
    return f"{short(summary['median'])} ({short(summary['lower_quartile'])}–{short(summary['upper_quartile'])})"


def _middle(key: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    """The median of a reading; empty where it was not taken."""
    return lambda case: short(case[key]["median"] * scale) if key in case else ""


def _memory(found: Mapping[str, Any]) -> str:
    """Of the first kind of memory that was looked at, in MB."""
    value = next((found[key] for key in _MEMORY if key in found), None)
    if value is None:
        return "–"
    return short((value["median"] if isinstance(value, Mapping) else value) / 1e6)


def _sent(row: Mapping[str, Any]) -> str:
    """By every rank in a step."""
    counted = f"{row['sent_bytes']['median'] / 1e6:.2f}" if "sent_bytes" in row else "not counted"
    return f"{counted} ({row['least_bytes']['median'] / 1e6:.2f})"


def _table(
    first: str, rows: Mapping[str, dict[str, Any]], columns: Mapping[str, Callable[[dict[str, Any]], str]]
) -> Table:
    """A row a case; a column that is empty in all of them is left out."""
    cells = {title: [cell(row) for row in rows.values()] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    return Table((first, *cells), [tuple(line) for line in zip(rows, *cells.values(), strict=True)])


def _bars(name: str, cases: Mapping[str, Any], unit: str, control: str, caption: str) -> Picture:
    key = unit.replace("/", "_per_")
    rows = [
        (case, one[key]["median"], one[key]["lower_quartile"], one[key]["upper_quartile"])
        for case, one in cases.items()
    ]
    return Picture(name, bars(rows, unit, control), f"{caption}: {unit}, median and quartiles")


def _notes(result: Mapping[str, Any]) -> Iterator[Block]:
    """What was not measured, and why."""
    for name, reason in result.get("left_out", {}).items():
        yield Text(f"Not measured: {name}, because {reason}.")
