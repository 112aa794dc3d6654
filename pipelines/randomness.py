"""Counter-based random numbers: every number is a pure function of (seed, domain, epoch, sample, view, slot).

There is no stream and no state. Every worker, backend and process computes the same numbers, in any order, so a run
resumes at any step without saving a generator.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
key = (seed, domain) and counter = (slot, view, sample, epoch), each 32 bits wide. Triton's
`tl.philox(seed | domain << 32, slot, view, sample, epoch)` gives the same four words.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = np.uint64(ROUND_A), np.uint64(ROUND_B)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Domain(IntEnum):
    """What a number is for; numbers of different domains are independent."""

    BOX = 0
    COLOUR = 1
    ORDER = 2
    SHUFFLE = 3
    SUBSET = 4
    NEGATIVES = 5


def philox(
    seed: int, domain: Domain, *, slot: ArrayLike = 0, view: ArrayLike = 0, sample: ArrayLike = 0, epoch: ArrayLike = 0
) -> np.ndarray:
    """Four 32-bit words for every broadcast (slot, view, sample, epoch).

    Returns (4, ...) uint32. Raises ValueError for a seed that does not fit in 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: expected a whole number from 0 to {2**32 - 1}")
    counters = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (slot, view, sample, epoch)))
    return philox_words(counters, (seed, int(domain)))


def philox_words(counters: list[np.ndarray] | tuple[np.ndarray, ...], key: tuple[int, int]) -> np.ndarray:
    """Ten Philox rounds over four equal-shaped uint64 counter arrays (values below 2³²). Returns (4, ...) uint32."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (b >> _32) ^ c1 ^ np.uint64(k0), b & _LOW, (a >> _32) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + WEYL_A) & 0xFFFFFFFF, (k1 + WEYL_B) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def uniform(words: np.ndarray) -> np.ndarray:
    """Words to float64 in [0, 1) on a grid of 2⁻²⁴, so that float32 holds each value exactly."""
    return (words >> np.uint32(8)) * 2.0**-24


def permutation(seed: int, domain: Domain, count: int, *, slot: int = 0, epoch: int = 0) -> np.ndarray:
    """(count,) int64: a permutation of 0 to count-1 that depends on nothing but the arguments.

    Sorts by 64-bit keys; equal keys keep their order (with 10⁷ elements the chance of one tie is below 10⁻⁵).
    """
    high, low, _, _ = philox(seed, domain, slot=slot, sample=np.arange(count), epoch=epoch).astype(np.uint64)
    return np.argsort((high << _32) | low, kind="stable")
