"""The queue is a ring of the last K keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoco.errors import ConfigError
from fastmoco.model.key_queue import KeyQueue

DIM = 3


def make_queue(size: int, seed: int = 0) -> KeyQueue:
    return KeyQueue(size, DIM, torch.Generator().manual_seed(seed))


def rows(start: int, count: int) -> torch.Tensor:
    """Row i holds the number start + i, so that every key can be told from the others."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(-1, DIM)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), counts=st.lists(st.integers(0, 25), max_size=8))
def test_it_holds_what_a_loop_would_hold(size: int, counts: list[int]) -> None:
    queue = make_queue(size)
    expected, pointer, number = queue.keys.clone(), 0, 100
    for count in counts:
        keys = rows(number, count)
        for key in keys:
            expected[pointer] = key
            pointer = (pointer + 1) % size
        queue.enqueue(keys)
        number += count
        assert torch.equal(queue.keys, expected)
        assert queue.pointer.item() == pointer


@pytest.mark.parametrize("count", [3, 5, 12])
def test_a_refused_batch_changes_nothing(count: int) -> None:
    queue = make_queue(5)
    queue.enqueue(rows(0, 3), torch.tensor(True))
    assert queue.pointer.item() == 3
    before = queue.keys.clone()
    queue.enqueue(torch.full((count, DIM), torch.nan), torch.tensor(False))
    assert torch.equal(queue.keys, before)
    assert queue.pointer.item() == 3


def test_it_starts_with_unit_vectors_of_its_generator() -> None:
    keys = make_queue(1000).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(1000))
    assert keys.mean(dim=0).norm() < 0.1
    assert torch.equal(keys, make_queue(1000).keys)
    assert not torch.equal(keys, make_queue(1000, seed=1).keys)


def test_it_keeps_float32_and_no_graph() -> None:
    queue = make_queue(4)
    queue.enqueue(torch.ones(2, DIM, dtype=torch.bfloat16, requires_grad=True))
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad


def test_it_resumes_from_its_state() -> None:
    queue, other = make_queue(5), make_queue(5, seed=1)
    queue.enqueue(rows(0, 7))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(rows(10, 2))
    assert torch.equal(queue.keys, other.keys)
    assert torch.equal(queue.pointer, other.pointer)


def test_an_empty_queue_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 keys"):
        make_queue(0)
