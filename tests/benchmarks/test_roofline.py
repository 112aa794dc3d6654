"""The roofline: FLOPs agree with torch's counter, bytes with the formulas, and rates are shares of the bound."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import roofline
from benchmarks.measure import ceilings
from benchmarks.measure.harness import summarise
from benchmarks.measure.plain import Task
from benchmarks.measure.traffic import Ceilings, Kernel, count_step, group_of, groups_of
from benchmarks.measure.variants import CONFIGS, step_flops
from fastmoco.errors import ConfigError
from fastmoco.model.encoder import build_encoder
from tests.benchmarks import sample_results as samples

TINY = Task(**samples.TASK)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=150)


@pytest.mark.parametrize(("name", "batch_size"), [("cifar", 16), ("r50", 8)])
def test_flops_equal_those_of_torchs_counter(name: str, batch_size: int) -> None:
    task = replace(CONFIGS[name], batch_size=batch_size)
    assert sum(kernel.flops for kernel in count_step(task, 2)) == step_flops(task)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_bytes_of_the_stem_and_the_update_are_those_of_the_formulas(element_bytes: int) -> None:
    groups = groups_of(count_step(TINY, element_bytes), Ceilings(1.0, 1.0))
    views, maps, weight = 8 * 3 * 8 * 8, 8 * 64 * 8 * 8, 64 * 3 * 3 * 3
    assert groups["stem, 3×3 convolutions"].bytes == 3 * element_bytes * (views + maps + weight)
    assert groups["stem, 3×3 convolutions"].flops == 3 * 2 * maps * 3 * 3 * 3  # two forwards, one gradient
    # two forwards of three passes, one backward of five
    assert groups["stem, batch norm"].bytes == (2 * 3 + 5) * element_bytes * maps
    parameters = sum(p.numel() for p in build_encoder("resnet18", stem="cifar", dim=16).parameters())
    assert groups["update"].bytes == (32 if element_bytes == 4 else 36) * parameters
    assert groups["loss"].flops == 2 * (2 * 8 * 64 * 16 + 2 * 8 * 16)


def test_gradients_are_collected_in_float32() -> None:
    ceilings = Ceilings(1.0, 1.0)
    exact, low = (groups_of(count_step(TINY, size), ceilings)["weights"].bytes for size in (4, 2))
    assert low == exact * 6 / 8


def test_the_pooling_of_the_stem_is_part_of_its_batch_norm() -> None:
    kernels = [k for k in count_step(replace(CONFIGS["r50"], batch_size=16), 2) if k.group == "stem, batch norm"]
    x, y = 2 * 16 * 64 * 112 * 112, 2 * 16 * 64 * 56 * 56
    found = {kernel.description: kernel.bytes for kernel in kernels}
    assert found == {"query forward": 2 * x + y + y // 2, "key forward": 2 * x + y, "backward": 3 * x + 2 * y + y}


def test_two_gradients_of_a_blocks_input_are_added_while_they_are_read() -> None:
    """The second one is one more pass; after the stem their total is written, too."""
    for name in ("cifar", "r50"):
        task = replace(CONFIGS[name], batch_size=16)
        sums = [k.bytes for k in count_step(task, 2) if k.description == "sum of the gradients of a block's input"]
        side, channels = (32, 64) if name == "cifar" else (56, 64)
        assert sums[0] == 2 * 2 * 16 * channels * side * side
        assert sums[1] == 2 * 16 * (64 if name == "cifar" else 256) * side * side


def test_fused_convolutions_save_passes_over_the_tensors_of_a_bottleneck() -> None:
    task = replace(CONFIGS["r50"], batch_size=8)
    apart, fused = count_step(task, 2), count_step(task, 2, fused=True)
    assert sum(k.flops for k in fused) == sum(k.flops for k in apart)
    saved = sum(k.bytes for k in apart) - sum(k.bytes for k in fused)
    # planes, sides of conv1's result and of the other two, whether a block of the stage follows
    blocks = [(64, 56, 56, i < 2) for i in range(3)]
    for planes, side, count in ((128, 28, 4), (256, 14, 6), (512, 7, 3)):
        blocks += [(planes, 2 * side if i == 0 else side, side, i < count - 1) for i in range(count)]
    expected = 0
    for planes, first, side, followed in blocks:
        y1, y2, y3 = (2 * 8 * channels * s * s for channels, s in ((planes, first), (planes, side), (4 * planes, side)))
        expected += 2 * (y1 + 2 * y2 + y3) + y2  # forward in either encoder, and backward
        expected += (2 * y3 + 2 * y3) * followed  # the next block does not read what it applies, or its gradient
    assert saved == expected
    assert count_step(TINY, 2, fused=True) == count_step(TINY, 2), "a basic block has none"


def test_the_minimum_time_is_the_sum_over_kernels() -> None:
    ceilings = Ceilings(flop_per_s=100.0, bytes_per_s=10.0)
    kernels = [Kernel("products", "", 1000.0, 20.0), Kernel("sums", "", 0.0, 40.0)]
    whole = group_of(kernels, ceilings)
    assert ceilings.ridge == 10.0
    assert whole.seconds == 10.0 + 4.0
    assert whole.compute_share == pytest.approx(10 / 14)
    assert whole.intensity == pytest.approx(1000 / 60)
    assert {name: group.bound for name, group in groups_of(kernels, ceilings).items()} == {
        "products": "arithmetic",
        "sums": "memory",
    }
    assert group_of(kernels, Ceilings(1e6, 10.0)).bound == "memory"


def test_results_of_step_and_train_are_compared_with_measured_ceilings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: Any, settings: Any, left_out: Any, after_round: Callable[[Any, int], None]) -> None:
        after_round({"fp32": summarise([1e11]), "bf16": summarise([4e11]), "copy": summarise([2e10])}, 2)

    monkeypatch.setattr(roofline, "measure_ceilings", measure)
    results = samples.write(tmp_path / "in", step=samples.step(60.0), train=samples.train(0.5))
    out = tmp_path / "out"
    roofline.main(roofline.Settings(results=results, quick=True, device="cpu", out=out), quiet())
    result = json.loads((out / "roofline.json").read_text())
    assert set(result["ceilings"]) == {"fp32", "bf16", "copy"}
    ablation, trained = result["steps"]
    assert [(point["name"], point["format"]) for point in ablation["points"]] == [
        ("plain", "fp32"),
        ("trainstep", "bf16"),
    ]
    assert {point["name"]: point["images_per_s"] for point in trained["points"]} == {
        "step alone": 60.0,
        "plain step alone": 20.0,
        "resident, from files": 30.0,
        "plain, from files": 15.0,
    }
    for placed in result["steps"]:
        for point in placed["points"]:
            at = placed["formats"][point["format"]]
            assert point["share_of_roof"] == pytest.approx(point["images_per_s"] * at["seconds"] / TINY.batch_size)
            assert sum(group["seconds"] for group in at["groups"].values()) == pytest.approx(at["seconds"])
        picture = (out / f"roofline-{placed['name']}.svg").read_text(encoding="utf-8")
        labels = " ".join(text for text in ET.fromstring(picture).itertext())
        assert all(point["name"] in labels for point in placed["points"])
        assert "GB/s" in labels


def test_a_folder_without_a_step_is_refused(tmp_path: Path) -> None:
    samples.write(tmp_path, pipelines=samples.pipelines())
    with pytest.raises(ConfigError, match=r"no result of step\.py"):
        roofline.main(roofline.Settings(results=tmp_path, quick=True, device="cpu"), quiet())


def test_a_processor_without_bf16_instructions_has_one_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    for amp, formats in (("fp32", ("fp32",)), ("bf16", ("fp32", "bf16"))):
        monkeypatch.setattr(ceilings, "pick_amp", lambda name, device, amp=amp: amp)
        assert ceilings.formats_on(torch.device("cpu")) == formats
    assert ceilings.format_of(torch.float32, torch.device("cpu")) == "fp32"
    assert ceilings.format_of(torch.float32, torch.device("cuda")) == "tf32"
    assert ceilings.format_of(torch.float16, torch.device("cuda")) == "fp16"


def test_a_product_has_the_type_of_its_format() -> None:
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        assert ceilings.matrix_product(name, torch.device("cpu"), 8)().dtype == dtype
    assert torch.get_float32_matmul_precision() == "highest"


def test_ceilings_of_copies_and_products_are_plausible() -> None:
    measured = roofline.measure_ceilings(
        torch.device("cpu"), roofline.Settings(quick=True, seconds=0.01, repetitions=1), {}
    )
    assert 1e8 < measured["copy"].median < 1e13
    assert 1e8 < measured["fp32"].median < 1e14


@pytest.mark.slow
def test_the_script_measures_a_step_itself(tmp_path: Path) -> None:
    result = roofline.main(roofline.Settings(quick=True, device="cpu", out=tmp_path), quiet())
    names = [point["name"] for point in result["steps"][0]["points"]]
    assert names == ["plain", "trainstep"]
    assert all(0 < point["share_of_roof"] < 20 for point in result["steps"][0]["points"])
