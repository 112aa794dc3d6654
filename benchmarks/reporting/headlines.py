"""One line per result: its rate, a comparison, and the bottleneck. Used in reports and in the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.harness import short
from benchmarks.reporting.collected import Collection

BASELINE, PLAIN = "dataloader", "plain"  # the names in results; importing the scripts takes seconds
_NEAR_ROOFLINE = 0.6  # share from which the roofline explains the rate


@dataclass(frozen=True)
class Headline:
    """What was measured, its value, and a comparison."""

    subject: str
    value: str
    comparison: str

    def __str__(self) -> str:
        return f"{self.subject}: **{self.value}**" + (f", {self.comparison}" if self.comparison else "")


def headlines(collection: Collection) -> list[Headline]:
    """The best result of every script, in the order of the report."""
    return [
        *_pipelines(collection),
        *_steps(collection),
        *_end_to_end(collection),
        *_peers(collection),
        *_neighbours(collection),
        *_accuracy(collection),
    ]


def describe_task(task: Mapping[str, Any]) -> str:
    width = f" of width {task['width']:g}" if task.get("width", 1) != 1 else ""
    return f"{task['arch']}{width} at {task['side']} px, batch {task['batch_size']}"


def data_name(result: Mapping[str, Any]) -> str:
    """Name of the data set, such as `cifar10/train`, from its description."""
    data = result.get("data") or {}
    return data.get("description", "").split(":")[0]


def format_ratio(ratio: Mapping[str, Any] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f}×"


def _fastest(cases: Mapping[str, Any]) -> str:
    return max(cases, key=lambda name: cases[name]["images_per_s"]["median"])


def _pipelines(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("pipelines").values():
        ours = {name: case for name, case in result["cases"].items() if name != BASELINE}
        if not ours or any("slope_mb_per_epoch" in case for case in ours.values()):
            continue
        best, settings = _fastest(ours), result["settings"]
        output = "views" if settings["colour"] else "crops without colour"
        ratio = ours[best]["ratio_to_control"]
        yield Headline(
            f"data loading only, {settings['crop_size']} px {output}, {data_name(result)}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            "" if ratio is None else f"{ratio['median']:.1f} times a plain DataLoader",
        )


def _steps(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("step").values():
        ours = {name: variant for name, variant in result["rungs"].items() if name != PLAIN}
        if not ours:
            continue
        best = _fastest(ours)
        ratio = ours[best]["ratio_to_plain"]
        yield Headline(
            f"training step alone, {describe_task(result['task'])}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            "" if ratio is None else f"{ratio['median']:.1f} times the plain step",
        )
        yield from _memory(result, best)


def _memory(result: Mapping[str, Any], variant: str) -> Iterator[Headline]:
    """Peak of a variant's tensors on a GPU; on a CPU, the peak of the process says little about the step."""
    of = {name: rung["memory"].get("peak_allocated_bytes") for name, rung in result["rungs"].items()}
    peak, plain = of[variant], of.get(PLAIN)
    if peak is not None:
        yield Headline(
            f"peak memory of the training step, {describe_task(result['task'])}, `{variant}`",
            f"{short(peak / 1e9)} GB",
            f"{peak / plain:.0%} of the plain step" if plain else "",
        )


def _end_to_end(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("train").values():
        ours = {name: case for name, case in result["cases"].items() if name not in (PLAIN, BASELINE)}
        if not ours:
            continue
        best = _fastest(ours)
        share, ratio = ours[best].get("share_of_step_only"), ours[best].get("ratio_to_plain")
        comparison = [f"{ratio['median']:.1f} times a plain DataLoader with a plain step"] if ratio else []
        comparison += [f"{share['median']:.0%} of the step alone"] if share else []
        yield Headline(
            f"end to end from files, {describe_task(result['task'])}, {data_name(result)}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            ", ".join(comparison),
        )


def _peers(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("peers").values():
        ours = {name: row for name, row in result["rows"].items() if name in result["ratios"]}
        if not ours:
            continue
        best = _fastest(ours)
        factors = [f"{ratio['median']:.1f} times {peer_label(peer)}" for peer, ratio in result["ratios"][best].items()]
        yield Headline(
            f"compared with other trainers, {describe_task(result['task'])}, {data_name(result)}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            ", ".join(factors),
        )


def _neighbours(collection: Collection) -> Iterator[Headline]:
    """Share of the idle rate that each pipeline keeps beside the smallest number of busy processes."""
    for result in collection.of("neighbours").values():
        rows = {(row["pipeline"], row["threads"], row["neighbours"]): row for row in result["rows"]}
        fewest = min((count for _, _, count in rows if count), default=None)
        busy = f"{fewest} busy process{'es' * (fewest != 1)}"
        for (pipeline, threads, count), row in rows.items():
            fixed = rows.get((pipeline, "fixed", count))
            if threads != "tuned" or count != fewest or fixed is None:
                continue
            yield Headline(
                f"training beside {busy}, {describe_task(result['task'])}, `{pipeline}`",
                f"{row['to_idle_fixed']['median']:.0%} of the idle rate",
                f"{fixed['kept']['median']:.0%} with as many threads as cores",
            )


def _accuracy(collection: Collection) -> Iterator[Headline]:
    """Complete runs of a recipe, with the seeds of all files together."""
    seeds: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
    for result in collection.of("accuracy").values():
        for name, recipe in result["recipes"].items():
            for seed, run in recipe["runs"].items():
                if run["state"] == "done" and run["config"]["width"] == 1 and run["config"]["limit"] is None:
                    targets = [
                        {"percent": t["percent"], "minutes": t["training_minutes"][seed]} for t in recipe["targets"]
                    ]
                    seeds.setdefault(describe_run(name, run["config"]), []).append((run, targets))
    for run_name, runs in seeds.items():
        at_end = f"{statistics.median(run['final_percent'] for run, _ in runs):.1f} % at the end"
        count = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
        for i, target in enumerate(runs[0][1]):
            minutes = [targets[i]["minutes"] for _, targets in runs if targets[i]["minutes"] is not None]
            subject = f"to {target['percent']:g} % kNN, {run_name}"
            if len(minutes) == len(runs):
                yield Headline(subject, f"{short(statistics.median(minutes))} min", f"{at_end}, {count}")
            else:
                yield Headline(subject, f"reached by {len(minutes)} of {len(runs)}", at_end)


def describe_run(name: str, config: Mapping[str, Any]) -> str:
    """`cifar10-demo, 200 epochs`, and the differences from the recipe."""
    width = f" of width {config['width']:g}" if config["width"] != 1 else ""
    limit = f", {config['limit']:,} images" if config["limit"] else ""
    return f"{name}{width}, {config['epochs']} epochs{limit}"


def peer_label(name: str) -> str:
    base, _, best = name.partition("-best")
    return {"authors": "the authors' code"}.get(base, base) + (" at its best" if name.endswith("-best") else best)


def bottlenecks(collection: Collection) -> list[str]:
    """The bottleneck: input or step, and within the step arithmetic, memory or neither."""
    return [*_input_or_step(collection), *_within_step(collection)]


def _input_or_step(collection: Collection) -> Iterator[str]:
    for result in collection.of("train").values():
        ours = {name: case for name, case in result["cases"].items() if name != PLAIN}
        limits = []
        for name, case in ours.items():
            if "share_of_step_only" not in case:
                continue
            share, wait = case["share_of_step_only"]["median"], case["data_wait_percent"]["median"]
            limit = f"the {case['bottleneck']}"
            limits.append(f"`{name}` **{limit}** ({share:.0%} of the step's own rate, waits {wait:.0f} % of the time)")
        if limits:
            yield f"End to end, {describe_task(result['task'])}, bottleneck of each pipeline: {'; '.join(limits)}."


def _within_step(collection: Collection) -> Iterator[str]:
    for result in collection.of("roofline").values():
        for step in result["steps"]:
            form = step["formats"][step["main_format"]]
            points = [p for p in step["points"] if p["format"] == step["main_format"]]
            if not points:
                continue
            best = max(points, key=lambda point: point["images_per_s"])
            slowest = sorted(form["groups"], key=lambda name: form["groups"][name]["seconds"], reverse=True)[:3]
            longest = ", ".join(
                f"{name} ({form['groups'][name]['seconds'] / form['seconds']:.0%}, {form['groups'][name]['bound']})"
                for name in slowest
            )
            share = best["share_of_roof"]
            verdict = (
                f"it is bound by **{form['bound']}**"
                if share > _NEAR_ROOFLINE
                else f"{form['bound']} takes most of the minimum time, but **neither ceiling is near**: kernels are "
                "small, move more than necessary, or run slower than a matrix product"
            )
            yield (
                f"Within the step of {describe_task(step['task'])}, {form['compute_share']:.0%} of the minimum time is "
                f"in kernels limited by arithmetic; the longest are {longest}. `{best['name']}` runs at "
                f"**{share:.0%} of the roofline**: {verdict}."
            )
