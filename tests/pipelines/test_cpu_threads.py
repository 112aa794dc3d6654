"""parallel_for: every item once, in the caller's inference mode, without changing other threads' torch setting."""

from __future__ import annotations

import threading

import pytest
import torch

from pipelines.cpu_threads import parallel_for


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_item_once_each_operation_on_one_core() -> None:
    seen: list[tuple[int, int]] = []
    parallel_for(lambda item: seen.append((item, torch.get_num_threads())), range(50))
    assert sorted(item for item, _ in seen) == list(range(50))
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_of_the_caller_holds_for_every_item(inference: bool) -> None:
    with torch.inference_mode(inference):
        out = torch.zeros(4, 8)

        def add(row: int) -> None:
            out[row].add_(row)

        parallel_for(add, range(4))
    assert out.is_inference() == inference
    assert out.sum(1).tolist() == [0, 8, 16, 24]


def test_an_exception_reaches_the_caller() -> None:
    def fail_at_three(number: int) -> None:
        if number == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        parallel_for(fail_at_three, range(6))
