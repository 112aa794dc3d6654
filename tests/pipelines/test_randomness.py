"""Philox against its authors' known answers and Triton's; uniform numbers in [0, 1) and permutations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.randomness import Domain, permutation, philox, philox_words, uniform

SEEDS = st.integers(0, 2**32 - 1)

# Counter, key and result of Random123's known-answer file for philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    actual = philox_words([np.array([c], dtype=np.uint64) for c in counter], key)
    assert actual.dtype == np.uint32
    assert actual[:, 0].tolist() == list(words)


@pytest.mark.any_device
def test_triton_gives_the_same_words(require_backend) -> None:
    """Kernels can draw the host's numbers with key = seed | domain << 32."""
    require_backend("triton")
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out, key, slot, view, epoch, count: tl.constexpr):
        sample = tl.arange(0, count)
        zero = tl.zeros([count], tl.int32)
        a, b, c, d = tl.philox(key, zero + slot, zero + view, sample, zero + epoch)
        tl.store(out + sample, a.to(tl.int64))
        tl.store(out + count + sample, b.to(tl.int64))
        tl.store(out + 2 * count + sample, c.to(tl.int64))
        tl.store(out + 3 * count + sample, d.to(tl.int64))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    actual = torch.empty((4, 16), dtype=torch.int64, device=device)
    seed, domain = 123456789, Domain.COLOUR
    draw[(1,)](actual, seed | int(domain) << 32, 2, 1, 7, 16)  # pyright: ignore
    expected = philox(seed, domain, slot=2, view=1, sample=np.arange(16), epoch=7)
    np.testing.assert_array_equal(actual.cpu().numpy() & 0xFFFFFFFF, expected)


def test_every_number_is_the_same_alone_and_in_an_array() -> None:
    array = philox(
        5, Domain.BOX, slot=np.arange(3)[:, None, None], view=np.array([0, 1])[:, None], sample=np.arange(7), epoch=4
    )
    assert array.shape == (4, 3, 2, 7)
    for slot, view, sample in np.ndindex(3, 2, 7):
        alone = philox(5, Domain.BOX, slot=slot, view=view, sample=sample, epoch=4)
        np.testing.assert_array_equal(array[:, slot, view, sample], alone)


def test_every_argument_matters() -> None:
    """Changing any of seed, domain, slot, view, sample or epoch changes all four words."""
    base = philox(1, Domain.BOX)
    changed = [philox(2, Domain.BOX), philox(1, Domain.ORDER)]
    changed += [philox(1, Domain.BOX, **{name: 1}) for name in ("slot", "view", "sample", "epoch")]
    assert len({tuple(words.tolist()) for words in [base, *changed]}) == 7
    for words in changed:
        assert (words != base).all()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_32_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed {seed}: expected a whole number from 0 to 4294967295"):
        philox(seed, Domain.BOX)


def test_uniform_is_in_the_half_open_interval_and_exact_in_float32() -> None:
    extremes = uniform(np.array([0, 255, 256, 2**32 - 1], dtype=np.uint32))
    np.testing.assert_array_equal(extremes, [0, 0, 2**-24, 1 - 2**-24])
    np.testing.assert_array_equal(extremes.astype(np.float32).astype(np.float64), extremes)


def test_uniform_is_uniform_and_its_words_are_independent() -> None:
    """40,000 numbers per word: χ² of 64 bins within its 10⁻⁶ tail, correlations of words below 5 deviations."""
    count, bins = 40_000, 64
    u = uniform(philox(0, Domain.COLOUR, sample=np.arange(count)))
    for word in u:
        counts = np.histogram(word, bins, (0, 1))[0]
        chi_squared = ((counts - count / bins) ** 2 / (count / bins)).sum()
        assert 22 < chi_squared < 135
    correlation = np.corrcoef(u)
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(count)


@given(SEEDS, st.integers(0, 300), st.integers(0, 1000))
def test_a_permutation_holds_every_number_once(seed: int, count: int, epoch: int) -> None:
    order = permutation(seed, Domain.ORDER, count, epoch=epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, permutation(seed, Domain.ORDER, count, epoch=epoch))


@given(SEEDS, st.integers(0, 1000))
def test_epochs_slots_and_domains_have_different_permutations(seed: int, epoch: int) -> None:
    orders = [
        permutation(seed, Domain.ORDER, 64, epoch=epoch),
        permutation(seed, Domain.ORDER, 64, epoch=epoch + 1),
        permutation(seed, Domain.ORDER, 64, epoch=epoch, slot=1),
        permutation(seed, Domain.SHUFFLE, 64, epoch=epoch),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_every_position_is_equally_likely() -> None:
    """1,500 permutations of 6: each number is at each position about 250 times (standard deviation 14.4)."""
    orders = np.stack([permutation(9, Domain.SHUFFLE, 6, epoch=epoch) for epoch in range(1500)])
    counts = np.stack([np.bincount(column, minlength=6) for column in orders.T])
    assert np.abs(counts - 250).max() < 5 * 14.4
