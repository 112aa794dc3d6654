"""The harness: statistics, interleaving, result files, processes and memory; and the scripts for loaders and steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks import loaders, step
from benchmarks.loaders import BASELINE
from benchmarks.measure import resources
from benchmarks.measure.harness import Stopwatch, Summary, environment, ratios, short, summarise, write_json
from benchmarks.measure.plain import FoldedBatchNorm2d
from benchmarks.measure.sample_data import generate_jpegs, open_index, stored_bytes
from benchmarks.measure.turns import interleave
from benchmarks.measure.variants import CONFIGS, VARIANTS, step_flops, time_limit
from fastmoco.errors import ConfigError
from pipelines import host_memory
from pipelines.backends.select import PIPELINES

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_quartiles_are_numpys_and_every_value_is_kept() -> None:
    values = [5.0, 1.0, 9.0, 2.0, 7.0, 3.0]
    summary = summarise(values)
    assert (summary.lower_quartile, summary.median, summary.upper_quartile) == pytest.approx(
        tuple(np.quantile(values, [0.25, 0.5, 0.75]))
    )
    assert summary.values == tuple(values)
    assert summarise([4.0]) == Summary(4.0, 4.0, 4.0, (4.0,))


def test_ratios_are_within_a_round_so_that_a_slow_round_cancels_out() -> None:
    assert ratios([20.0, 2.0, 30.0], [10.0, 1.0, 15.0]) == Summary(2.0, 2.0, 2.0, (2.0, 2.0, 2.0))


def test_cases_are_interleaved_in_alternating_order() -> None:
    order: list[str] = []

    def case(name: str) -> dict[str, float]:
        order.append(name)
        return {"n": len(order)}

    readings = interleave({name: lambda name=name: case(name) for name in "abc"}, 3)
    assert order == list("abccbaabc")
    assert readings["a"] == [{"n": 1}, {"n": 6}, {"n": 7}]


def test_a_machine_that_slows_down_does_not_change_a_ratio() -> None:
    """With a clock that runs 10 % faster in every reading, equal cases have equal results only when interleaved."""
    now = 0.0
    readings_so_far = 0

    def clock() -> float:
        return now

    def case() -> dict[str, float]:
        nonlocal now, readings_so_far
        watch = Stopwatch(CPU, clock)
        watch.start()
        now += 1.1**readings_so_far
        readings_so_far += 1
        return {"s": watch.stop()}

    taken = interleave({"ours": case, "baseline": case}, 4)
    ours, baseline = ([reading["s"] for reading in taken[name]] for name in ("ours", "baseline"))
    assert ratios(ours, baseline).median == pytest.approx(1.0, abs=0.01)


def test_numbers_have_three_significant_digits() -> None:
    assert [short(v) for v in (0.0123456, 0.5, 1.234, 99.4, 1234.5, 0.0)] == [
        "0.0123", "0.500", "1.23", "99.4", "1,234", "0",
    ]  # fmt: skip


def test_the_environment_names_hardware_versions_commit_and_command(tmp_path: Path) -> None:
    described = environment(CPU)
    assert described["cores"] == len(os.sched_getaffinity(0))
    assert described["cpu"]
    assert described["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"torchvision", "triton", "dali", "ffcv", "cuda", "cudnn"} <= described["versions"].keys()
    assert {"git_commit", "command", "date", "driver", "gpu", "memory_gib"} <= described.keys()
    write_json(tmp_path / "new" / "result.json", {"environment": described, "rate": summarise([1.0, 2.0])})
    assert json.loads((tmp_path / "new" / "result.json").read_text())["rate"]["values"] == [1.0, 2.0]


def test_a_result_file_has_one_line_per_case_and_reads_back_equal(tmp_path: Path) -> None:
    case = {"images_per_s": {"median": 0.1 + 0.2, "values": [1 / 3, 1e-17]}, "state": "“done”"}
    rows = [{"point": 1, "kept": None}, {"point": 2, "kept": [True, {}]}]
    result = {"benchmark": "x", "cases": {"a|b": case, "empty": {}}, "rows": rows, "nested": {"cases": {"c": case}}}
    write_json(tmp_path / "result.json", result)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == result
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert f'"a|b": {json.dumps(case, ensure_ascii=False)}' in lines
    assert json.dumps(rows[0]) in lines


_BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"


def test_cpu_time_includes_running_and_finished_descendants() -> None:
    """A child waits for a grandchild that works for 0.3 s, and then works for 0.3 s itself."""
    before = resources.cpu_seconds()
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_BURN!r}])\n{_BURN}print()\ninput()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in [process.pid for process in resources.process_tree()]
        used_s = resources.cpu_seconds() - before
        child.communicate(b"\n")
    assert 0.58 < used_s < 2.0  # the rest is three interpreters starting
    assert resources.cpu_seconds() - before >= used_s


def test_memory_includes_children_and_the_peak_includes_freed_memory() -> None:
    megabytes = 64
    before = resources.memory_bytes()
    script = f"data = bytearray(b'x' * ({megabytes} << 20))\nprint()\ninput()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert resources.memory_bytes() - before > megabytes << 20
        child.communicate(b"\n")
    host_memory.reset_peak_resident()
    resident = resources.resident_bytes()
    block = torch.ones(megabytes << 18)
    del block
    assert resources.peak_resident_bytes() - resident > 0.9 * (megabytes << 20)


def test_the_folded_batch_norm_normalises_every_group_separately() -> None:
    norm = FoldedBatchNorm2d(6, num_splits=4).train()
    x = 3 * torch.randn(8, 6, 5, 5) + 1
    y = norm(x)
    expected = torch.empty_like(y)
    for group in range(4):  # sample n is in group n mod s
        expected[group::4] = F.batch_norm(x[group::4], None, None, training=True)
    torch.testing.assert_close(y, expected)
    means = torch.stack([x[group::4].mean(dim=(0, 2, 3)) for group in range(4)]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * means)


def test_flops_of_resnet50_are_those_of_the_literature() -> None:
    """4.09 billion multiply-adds forward (torchvision's table), 1 + 3 times an image, less the input's gradient."""
    task = CONFIGS["r50"]
    stem = 2 * 64 * 3 * 49 * 112 * 112
    forward = 2 * 4.09e9
    logits = 3 * 2 * task.queue * task.dim - 2 * task.queue * task.dim  # no gradient into the queue
    assert step_flops(task) / task.batch_size == pytest.approx(4 * forward - stem + logits, rel=0.01)


def test_a_slow_build_is_stopped() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="not built within"), time_limit(0.05):
        time.sleep(5)
    assert time.monotonic() - began < 2
    with pytest.raises(TimeoutError, match="no time was left"), time_limit(-1.0):
        pytest.fail("the block was entered")


def test_generated_jpegs_are_as_large_as_photographs(tmp_path: Path) -> None:
    generate_jpegs(tmp_path / "photos", 2, (375, 500))
    index = open_index(str(tmp_path / "photos"), 224, None, tmp_path)
    assert index.sizes.tolist() == [[375, 500]] * 2
    assert 60_000 < stored_bytes(index) / 2 < 160_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loaders.main(loaders.Settings(backends="resident,tensorflow")), "tensorflow"),
        (
            lambda: loaders.main(loaders.Settings(data="shapes", limit=100, batch_size=512, backends="")),
            "512 is more than the 100",
        ),
        (lambda: step.main(step.Settings(rungs="plain,marble", quick=True)), "--rungs marble is unknown"),
        (lambda: step.main(step.Settings(quick=True, queue=60, device="cpu")), "--queue 60 is no multiple"),
        (lambda: step.main(step.Settings(quick=True, profile=True)), "--out"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.slow
def test_the_step_script_measures_every_variant_and_writes_all_readings(tmp_path: Path) -> None:
    settings = step.Settings(quick=True, profile=True, rungs="plain,trainstep", device="cpu", out=tmp_path)
    with open(tmp_path / "table.txt", "w", encoding="utf-8") as file:
        step.main(settings, Console(file=file, width=150))
    result = json.loads((tmp_path / "step-cifar.json").read_text())
    assert list(result["rungs"]) == ["plain", "trainstep"]
    assert result["left_out"] == {}
    for readings in result["rungs"].values():
        assert len(readings["images_per_s"]["values"]) == 2
        rate, ms = readings["images_per_s"]["values"][0], readings["ms"]["values"][0]
        assert rate == pytest.approx(result["task"]["batch_size"] / ms * 1e3)
        assert readings["tflop_per_s"] == pytest.approx(result["step_flops"] / readings["ms"]["median"] / 1e9)
        assert 0 < readings["share_of_roofline"] < 10
        assert readings["memory"]["peak_resident_bytes"] > 50e6  # two encoders of 45 MB
    assert result["rungs"]["plain"]["ratio_to_plain"]["values"] == [1.0, 1.0]
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert all(variant.change in table for variant in VARIANTS if variant.name in result["rungs"])
    assert "aten::convolution_backward" in table
    assert (tmp_path / "trace-cifar-trainstep.json.gz").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(("colour", "backends"), [(True, PIPELINES), (False, ("resident", "torch", BASELINE))])
def test_the_loader_script_measures_or_lists_every_backend(
    tmp_path: Path, colour: bool, backends: tuple[str, ...]
) -> None:
    """Started as a file, as in its documentation."""
    flags = ["--quick", "--device", "cpu", "--batch-size", "32", "--workers", "1", "--out", str(tmp_path)]
    flags += ["--backends", ",".join(backends), "--colour" if colour else "--no-colour"]
    command = [sys.executable, "benchmarks/loaders.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kind = "views" if colour else "crops"
    result = json.loads((tmp_path / f"pipelines-{kind}-32px.json").read_text())
    assert result["cases"].keys() | result["left_out"].keys() == set(backends)
    assert {"resident", "torch", BASELINE} <= result["cases"].keys()
    assert result["data"]["images"] == 1024
    for name, readings in result["cases"].items():
        assert name in done.stdout
        assert len(readings["images_per_s"]["values"]) == 2
        assert readings["images_per_s"]["median"] > 0
        assert readings["cpu_ms_per_image"]["median"] > 0
    assert result["cases"][BASELINE]["ratio_to_control"]["values"] == [1.0, 1.0]
    assert result["cases"]["torch"]["host_bytes"]["median"] > 0  # a worker is a process


@pytest.mark.slow
def test_memory_is_constant_for_resident_data(tmp_path: Path) -> None:
    """In a separate process: this one has children from other tests that may still be growing."""
    flags = "--data shapes --limit 64 --batch-size 16 --backends resident --slope --quick --workers 0 --device cpu"
    command = [sys.executable, "benchmarks/loaders.py", *flags.split(), "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert len(result["cases"]["resident"]["memory_mb"]) == 11
    assert abs(result["cases"]["resident"]["slope_mb_per_epoch"]) < 5
