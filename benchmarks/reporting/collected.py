"""The results of a suite: a folder while it runs, one JSON file once they are committed.

DIR/PART/*.json, DIR/PART/part.json                     results of the scripts, and the state of each part
benchmarks/results/HARDWARE/DATE-COMMIT.json            the same in one file, without paths or names of the machine
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure.harness import write_json
from fastmoco.errors import ConfigError
from pipelines.errors import DataError

RESULTS = Path(__file__).resolve().parents[1] / "results"
PART = "part.json"
SUITE = "suite.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_ROOTS = re.compile(r"(?<![\w:/.])/(?:[\w.@+-]+/)*(?=[\w.@+-])")  # the folders of an absolute path
_KERNEL = re.compile(r"(Linux-\d+\.\d+)[^ ]*?-(?=x86_64|aarch64)")


@dataclass(frozen=True)
class Collection:
    """Results by name, `PART/FILE` or `FILE`, and the records of the parts."""

    results: dict[str, dict[str, Any]]
    parts: list[dict[str, Any]] = field(default_factory=list)

    def of(self, benchmark: str) -> dict[str, dict[str, Any]]:
        """The results of one script: `step` matches step-cifar and step-r50."""
        return {name: result for name, result in self.results.items() if is_of(result, benchmark)}

    @property
    def newest(self) -> dict[str, Any]:
        """The environment of the latest result."""
        return max((result["environment"] for result in self.results.values()), key=lambda e: e["date"])

    @property
    def quick(self) -> bool:
        """Whether any result was measured with --quick, which is not a measurement of speed."""
        return any(result.get("settings", {}).get("quick") for result in self.results.values())


def is_of(result: Mapping[str, Any], benchmark: str) -> bool:
    """Whether a script's name is `benchmark`, with or without a suffix for the configuration."""
    return re.fullmatch(rf"{benchmark}(-.*)?", result["benchmark"]) is not None


def read(path: Path) -> Collection:
    """Read a folder of results or a committed file. Raises ConfigError if there are none, DataError if damaged."""
    if path.is_file():
        kept = _load(path)
        if not isinstance(kept.get("results"), dict):
            raise DataError(f"{path} holds no results: expected a file that report.py --commit wrote")
        return Collection(kept["results"], kept.get("parts", []))
    results, parts = {}, []
    for file in sorted([*path.glob("*.json"), *path.glob("*/*.json")]):
        content = _load(file)
        if file.name == PART:
            parts.append(content)
        elif "benchmark" in content and "environment" in content:
            results[file.relative_to(path).with_suffix("").as_posix()] = content
    if not results and not parts:
        raise ConfigError(f"{path} holds no results: expected the --out of run_all.py or of a benchmark")
    return Collection(results, sorted(parts, key=lambda part: part.get("number", 0)))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): delete it and measure again") from None
    return content if isinstance(content, dict) else {}


def keep(folder: Path, hardware: str, results: Path = RESULTS) -> Path:
    """Write a folder of results to one file, named by the latest date and commit, and return its path.

    Paths that identify the machine are removed: folders become DATA and OUT, other absolute paths their last component.
    Raises ConfigError.
    """
    if not _NAME.fullmatch(hardware):
        raise ConfigError(
            f"--commit {hardware}: name the hardware in lower-case letters, digits and dashes, as in h200"
        )
    collection = read(folder)
    if not collection.results:
        raise ConfigError(f"{folder} holds no finished part: nothing to keep")
    if collection.quick:
        raise ConfigError(f"{folder} was measured with --quick, which is not a measurement of speed: it is not kept")
    newest = collection.newest
    roots = {str(folder): "OUT", str(folder.resolve()): "OUT"}
    if (suite := folder / SUITE).is_file():
        roots |= {str(root): "DATA" for root in _load(suite).get("data", []) if root}
    kept = {"hardware": hardware, "results": collection.results, "parts": collection.parts}
    path = results / hardware / f"{newest['date'][:10]}-{_short(newest['git_commit'])}.json"
    write_json(path, _without_paths(kept, roots))
    return path


def _short(commit: str | None) -> str:
    """Seven digits, and the `+` of a modified checkout."""
    return "unknown" if commit is None else commit[:7] + ("+" if commit.endswith("+") else "")


def _without_paths(value: Any, roots: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item, roots) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, roots) for item in value]
    if not isinstance(value, str):
        return value
    for root in sorted(roots, key=len, reverse=True):
        value = re.sub(rf"(?<![\w/]){re.escape(root)}(?![\w-])", roots[root], value)
    return _KERNEL.sub(r"\1-", _ROOTS.sub("", value))


def newest_by_hardware(results: Path = RESULTS) -> Iterator[tuple[str, Collection]]:
    """For each hardware, the latest committed result of each name: a later file replaces results that it repeats."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        merged: dict[str, dict[str, Any]] = {}
        files = [read(file) for file in folder.glob("*.json")]
        for collection in sorted(files, key=lambda c: c.newest["date"]):
            merged |= collection.results
        if merged:
            yield folder.name, Collection(merged)
