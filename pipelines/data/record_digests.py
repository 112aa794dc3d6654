"""Digests of the records in a large file: each is compared when its record is first read.

So opening the file takes no longer for a larger one, and yet nothing that has changed on disk is used.

N records
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

DIGEST_BYTES = 16  # the first ones of a SHA-256


def digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


@dataclass(frozen=True, eq=False)
class RecordDigests:
    """What N records must be.

    expected  (N, DIGEST_BYTES) uint8
    checked   (N,) bool, the records that were found intact, by this process
    """

    expected: np.ndarray
    checked: np.ndarray

    @staticmethod
    def text(digests: Iterable[bytes]) -> str:
        """The digests of N records as one text, in base 64."""
        return base64.b64encode(b"".join(digests)).decode("ascii")

    @classmethod
    def from_text(cls, text: str, count: int) -> RecordDigests:
        """The inverse of `text`, for N = count. Raises ValueError."""
        data = base64.b64decode(text, validate=True)
        if len(data) != count * DIGEST_BYTES:
            raise ValueError(f"it has {len(data) // DIGEST_BYTES:,} digests for {count:,} images")
        return cls(np.frombuffer(data, dtype=np.uint8).reshape(count, DIGEST_BYTES), np.zeros(count, dtype=bool))

    def is_intact(self, i: int, data: bytes) -> bool:
        """Whether these are the bytes of record i, from a comparison at the first call for it."""
        if not self.checked[i]:
            self.checked[i] = digest(data) == self.expected[i].tobytes()
        return bool(self.checked[i])

    def select(self, positions: np.ndarray) -> RecordDigests:
        """The digests at `positions`, which do not share what is checked from then on."""
        return RecordDigests(self.expected[positions], self.checked[positions])
