"""Pieces of work side by side: every piece once, in the caller's mode, and nobody else's number of threads changed."""

from __future__ import annotations

import threading

import pytest
import torch

from pipelines.cpu_threads import side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_piece_once_each_operation_on_one_core() -> None:
    seen: list[tuple[int, int]] = []
    side_by_side(lambda piece: seen.append((piece, torch.get_num_threads())), range(50))
    assert sorted(piece for piece, _ in seen) == list(range(50))
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.parametrize("inference", [False, True])
def test_the_mode_of_the_caller_holds_in_every_piece(inference: bool) -> None:
    with torch.inference_mode(inference):
        out = torch.zeros(4, 8)

        def add(row: int) -> None:
            out[row].add_(row)

        side_by_side(add, range(4))
    assert out.is_inference() == inference
    assert out.sum(1).tolist() == [0, 8, 16, 24]


def test_what_a_piece_raises_reaches_the_caller() -> None:
    def piece(number: int) -> None:
        if number == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        side_by_side(piece, range(6))
