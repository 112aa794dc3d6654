"""The figures of docs/parity.md, and the page itself; and that a change of the method exceeds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity import figures
from tests.parity.document import DOCUMENT, document
from tests.parity.figures import FIGURES, Figure


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.what.split(":")[0].split(",")[0])
def test_the_difference_is_within_its_bound(figure: Figure, require_backend: Callable[[str], None]) -> None:
    if "lightly" in figure.what:
        require_backend("lightly")
    assert figure.measure() <= figure.bound


def test_the_page_is_that_of_the_figures() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: uv run python -m tests.parity.document"


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.1001), ("ema_momentum", 0.9901), ("weight_decay", 0.0), ("lr", 0.0301)]
)
def test_another_setting_exceeds_the_bound(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = figures.our_step

    def changed(*arguments) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(figures.RATES, name, value)
            return ours(*arguments)

    def built(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(figures.RATES, name, value)
            return original(*arguments, **options)

    original = figures.ours
    monkeypatch.setattr(figures, "our_step", changed)
    monkeypatch.setattr(figures, "ours", built)
    assert figures.cifar_demo(symmetric=False) > 1e-7


def test_other_groups_and_another_order_of_keys_exceed_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = figures.our_step
    monkeypatch.setattr(figures, "our_step", lambda step, q, k, order: ours(step, q, k, order.roll(1)))
    assert figures.distributed_builder() > 1e-4
    monkeypatch.undo()
    monkeypatch.setattr(figures.StridedBatchNorm, "groups", 4)
    assert figures.cifar_demo(symmetric=False) > 1e-4


def test_a_bias_that_does_not_decay_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = torch.optim.SGD

    def split(parameters, **options) -> torch.optim.SGD:
        weight, bias = parameters
        return sgd([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], **options)

    monkeypatch.setattr(torch.optim, "SGD", split)
    assert figures.linear_weights() > 1e-6
