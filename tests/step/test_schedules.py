"""Learning rates and EMA momenta, computed by hand."""

import math

import numpy as np
import pytest
import torch

from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError
from fastmoco.run.resolve import resolve
from fastmoco.step.schedules import Rates, ema_momentum_at, lr_at
from pipelines.data.index import ImageIndex

NOISE = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)


def lr(step: int, schedule: str, **options) -> float:
    return lr_at(step, schedule=schedule, **({"base_lr": 0.4, "epochs": 4, "steps_per_epoch": 10} | options))


def test_cosine_changes_once_an_epoch() -> None:
    # 0.4 · ½ (1 + cos(π e / 4)): cos 0, π/4, π/2, 3π/4
    wanted = [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5))]
    assert [lr(10 * epoch, "cosine") for epoch in range(4)] == pytest.approx(wanted)
    assert lr(19, "cosine") == lr(10, "cosine")


def test_a_first_epoch_of_1_ends_the_cosine_where_it_is_told() -> None:
    """As in the CIFAR demo; a run of one epoch would not learn, and counts from 0."""
    wanted = [0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.0]
    assert [lr(10 * epoch, "cosine", first_epoch=1) for epoch in range(4)] == pytest.approx(wanted)
    assert [lr(10 * epoch, "step", first_epoch=1, milestones=(2,)) for epoch in range(3)] == pytest.approx(
        [0.4, 0.04, 0.04]
    )
    config, images = RunConfig().replace(cos=True, lr=0.4, first_epoch=1), ImageIndex.from_pixels("noise", NOISE)
    for epochs, rates in ((1, [0.4]), (2, [0.2, 0.0])):
        resolved, _ = resolve(config.replace(epochs=epochs, batch_size=16), images, torch.device("cpu"))
        assert [Rates(resolved, 1).lr(step) for step in range(epochs)] == pytest.approx(rates)


def test_cosine_per_step() -> None:
    # Step 5 of 40 is an eighth of the way: cos(π/8) = 0.92388.
    assert lr(5, "cosine", per_step=True) == pytest.approx(0.2 * 1.9238795)
    assert lr(20, "cosine", per_step=True) == pytest.approx(0.2)
    assert lr(40, "cosine", per_step=True) == pytest.approx(0.0)


def test_cosine_ends_where_it_is_told() -> None:
    # Half of the way from 0.4 to 0.1 after half of the steps.
    found = [lr(step, "cosine", final_lr=0.1, per_step=True) for step in (0, 20, 40)]
    assert found == pytest.approx([0.4, 0.25, 0.1])
    assert lr(39, "cosine", final_lr=0.1) == pytest.approx(0.1 + 0.15 * (1 - math.sqrt(0.5)))


def test_milestones_divide_by_ten() -> None:
    # MoCo v1: 0.03, a tenth from epoch 120 on, a hundredth from epoch 160 on.
    options = {"base_lr": 0.03, "epochs": 200, "milestones": (120, 160)}
    found = [lr(step, "step", **options) for step in (0, 1199, 1200, 1599, 1600, 1999)]
    assert found == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_constant() -> None:
    assert {lr(step, "constant") for step in range(40)} == {0.4}


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warmup_rises_every_step_to_the_base(schedule: str) -> None:
    found = [lr(step, schedule, warmup_epochs=2, milestones=(3,)) for step in (0, 9, 19, 20)]
    assert found == pytest.approx([0.02, 0.2, 0.4, 0.4])


def test_cosine_after_warmup_covers_the_rest() -> None:
    # Epoch 3 of 4 with 2 of warm-up is half of what is left.
    assert lr(30, "cosine", warmup_epochs=2) == pytest.approx(0.2)


def test_ema_momentum() -> None:
    constant = {ema_momentum_at(step, schedule="constant", base=0.999, total_steps=100) for step in (0, 50, 99)}
    assert constant == {0.999}
    cosine = [ema_momentum_at(step, schedule="cosine", base=0.99, total_steps=100) for step in (0, 50, 100)]
    assert cosine == pytest.approx([0.99, 0.995, 1.0])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cosin'.*cosine, step, constant"):
        lr(0, "cosin")
    with pytest.raises(ConfigError, match=r"'linear'.*constant, cosine"):
        ema_momentum_at(0, schedule="linear", base=0.999, total_steps=10)
