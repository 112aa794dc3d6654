"""What the results say in one line each: how fast, how much faster than what, and what limits it.

Written into reports and into the README; every number comes from a result file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.harness import short
from benchmarks.reporting.collected import Collection

CONTROL, PLAIN = "dataloader", "plain"  # as the scripts write them, whose imports take seconds
_NEAR = 0.6  # of the roofline: from here on it says what limits


@dataclass(frozen=True)
class Headline:
    """`what` was measured, its value, and that value beside another."""

    what: str
    value: str
    beside: str

    def __str__(self) -> str:
        return f"{self.what}: **{self.value}**" + (f", {self.beside}" if self.beside else "")


def headlines(collection: Collection) -> list[Headline]:
    """The best of every script, in the order of the report."""
    return [
        *_pipelines(collection),
        *_steps(collection),
        *_trained(collection),
        *_peers(collection),
        *_neighbours(collection),
        *_accuracy(collection),
    ]


def task_words(task: Mapping[str, Any]) -> str:
    width = f" of width {task['width']:g}" if task.get("width", 1) != 1 else ""
    return f"{task['arch']}{width} at {task['side']} px, batch {task['batch_size']}"


def data_words(result: Mapping[str, Any]) -> str:
    """`cifar10/train` of its description: what the images are called."""
    data = result.get("data") or {}
    return data.get("description", "").split(":")[0]


def times(ratio: Mapping[str, Any] | None) -> str:
    return "–" if ratio is None else f"{ratio['median']:.2f}×"


def _fastest(cases: Mapping[str, Any]) -> str:
    return max(cases, key=lambda name: cases[name]["images_per_s"]["median"])


def _pipelines(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("pipelines").values():
        ours = {name: case for name, case in result["cases"].items() if name != CONTROL}
        if not ours or "images_per_s" not in result["cases"][CONTROL]:
            continue
        best, settings = _fastest(ours), result["settings"]
        what = "views" if settings["colour"] else "crops without colour"
        yield Headline(
            f"data loading only, {settings['crop_size']} px {what}, {data_words(result)}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            f"{ours[best]['ratio_to_control']['median']:.1f} times a plain DataLoader",
        )


def _steps(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("step").values():
        ours = {name: rung for name, rung in result["rungs"].items() if name != PLAIN}
        if not ours:
            continue
        best = _fastest(ours)
        ratio = ours[best]["ratio_to_plain"]
        yield Headline(
            f"training step alone, {task_words(result['task'])}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            "" if ratio is None else f"{ratio['median']:.1f} times the plain step",
        )


def _trained(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("train").values():
        ours = {name: case for name, case in result["cases"].items() if name not in (PLAIN, CONTROL)}
        if not ours:
            continue
        best = _fastest(ours)
        share, ratio = ours[best]["share_of_step_only"]["median"], ours[best].get("ratio_to_plain")
        beside = [f"{ratio['median']:.1f} times a plain DataLoader with a plain step"] if ratio else []
        yield Headline(
            f"end to end from files, {task_words(result['task'])}, {data_words(result)}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            ", ".join([*beside, f"{share:.0%} of the step alone"]),
        )


def _peers(collection: Collection) -> Iterator[Headline]:
    for result in collection.of("peers").values():
        ours = {name: row for name, row in result["rows"].items() if name in result["ratios"]}
        if not ours:
            continue
        best = _fastest(ours)
        beside = [f"{ratio['median']:.1f} times {peer_words(peer)}" for peer, ratio in result["ratios"][best].items()]
        yield Headline(
            f"beside the peers, {task_words(result['task'])}, {data_words(result)}, `{best}`",
            f"{short(ours[best]['images_per_s']['median'])} images/s",
            ", ".join(beside),
        )


def _neighbours(collection: Collection) -> Iterator[Headline]:
    """Of every pipeline, what is left of the rate beside the fewest neighbours."""
    for result in collection.of("neighbours").values():
        rows = {(row["pipeline"], row["threads"], row["neighbours"]): row for row in result["rows"]}
        few = min((count for _, _, count in rows if count), default=None)
        beside = f"{few} busy process{'es' * (few != 1)}"
        for (pipeline, threads, count), row in rows.items():
            fixed = rows.get((pipeline, "fixed", count))
            if threads != "tuned" or count != few or fixed is None:
                continue
            yield Headline(
                f"training beside {beside}, {task_words(result['task'])}, `{pipeline}`",
                f"{row['to_idle_fixed']['median']:.0%} of the idle rate",
                f"{fixed['kept']['median']:.0%} with as many threads as cores",
            )


def _accuracy(collection: Collection) -> Iterator[Headline]:
    """Of whole runs of a recipe; its seeds count together, in whatever number of files they are."""
    seeds: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
    for result in collection.of("accuracy").values():
        for name, recipe in result["recipes"].items():
            for seed, run in recipe["runs"].items():
                if run["state"] == "done" and run["config"]["width"] == 1 and run["config"]["limit"] is None:
                    targets = [
                        {"percent": t["percent"], "minutes": t["training_minutes"][seed]} for t in recipe["targets"]
                    ]
                    seeds.setdefault(run_words(name, run["config"]), []).append((run, targets))
    for words, runs in seeds.items():
        at_end = f"{statistics.median(run['final_percent'] for run, _ in runs):.1f} % at the end"
        of = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
        for place, target in enumerate(runs[0][1]):
            minutes = [targets[place]["minutes"] for _, targets in runs if targets[place]["minutes"] is not None]
            reached = f"to {target['percent']:g} % kNN, {words}"
            if len(minutes) == len(runs):
                yield Headline(reached, f"{short(statistics.median(minutes))} min", f"{at_end}, {of}")
            else:
                yield Headline(reached, f"reached by {len(minutes)} of {len(runs)}", at_end)


def run_words(name: str, config: Mapping[str, Any]) -> str:
    """`cifar10-demo, 200 epochs`, and what differs from the recipe."""
    width = f" of width {config['width']:g}" if config["width"] != 1 else ""
    limit = f", {config['limit']:,} images" if config["limit"] else ""
    return f"{name}{width}, {config['epochs']} epochs{limit}"


def peer_words(name: str) -> str:
    base, _, best = name.partition("-best")
    return {"authors": "the authors' code"}.get(base, base) + (" at its best" if name.endswith("-best") else best)


def bottlenecks(collection: Collection) -> list[str]:
    """What limits, in words: the input or the step, and within the step arithmetic, memory or neither."""
    return [*_input_or_step(collection), *_within_step(collection)]


def _input_or_step(collection: Collection) -> Iterator[str]:
    for result in collection.of("train").values():
        ours = {name: case for name, case in result["cases"].items() if name != PLAIN}
        words = []
        for name, case in ours.items():
            share, wait = case["share_of_step_only"]["median"], case["data_wait_percent"]["median"]
            limit = f"the {case['bottleneck']}"
            words.append(f"`{name}` **{limit}** ({share:.0%} of the step's own rate, waits {wait:.0f} % of the time)")
        if words:
            yield f"End to end, {task_words(result['task'])}, what limits is with {'; '.join(words)}."


def _within_step(collection: Collection) -> Iterator[str]:
    for result in collection.of("roofline").values():
        for step in result["steps"]:
            form = step["formats"][step["main_format"]]
            points = [p for p in step["points"] if p["format"] == step["main_format"]]
            if not points:
                continue
            best = max(points, key=lambda point: point["images_per_s"])
            slowest = sorted(form["groups"], key=lambda name: form["groups"][name]["seconds"], reverse=True)[:3]
            most = ", ".join(
                f"{name} ({form['groups'][name]['seconds'] / form['seconds']:.0%}, {form['groups'][name]['bound']})"
                for name in slowest
            )
            share = best["share_of_roof"]
            verdict = (
                f"it is bound by **{form['bound']}**"
                if share > _NEAR
                else f"most of the least time is {form['bound']}'s, but **neither ceiling is near**: kernels are "
                "small, move more than they must, or run below what a product gives"
            )
            yield (
                f"Within the step of {task_words(step['task'])}, {form['compute_share']:.0%} of the least time goes to "
                f"kernels that arithmetic limits; the longest are {most}. `{best['name']}` runs at "
                f"**{share:.0%} of the roofline**: {verdict}."
            )
