"""The input of DALI's pipeline: encoded images and the boxes of their crops, read one batch ahead.

V views · B images per batch
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data.index import ImageIndex
from pipelines.data.plain_jpeg import JpegHeaders, stored_box
from pipelines.errors import DataError
from pipelines.views import BatchPlan

READERS = 8  # threads that read files: they wait for the disk, not the CPU
FILES_PER_TASK = 64  # submitting a task costs as much as reading a small file


@dataclass(frozen=True, slots=True)
class DaliBatch:
    """A plan whose images were passed to DALI.

    boxes         (V, B, 4) int32, in the images as stored
    orientations  (B,) uint8, EXIF orientation of the crops; 1 if upright
    inputs        what DALI reads without a copy: it must live until the crops of the batch are there
    """

    plan: BatchPlan
    boxes: np.ndarray
    orientations: np.ndarray
    inputs: list[Any]


class DaliBatches:
    """An external source of batches: [images, and with `corners` a corner and an extent (B, 2) int32 per view].

    Images are B encoded files, or (B, H, W, 3) pixels. At any time one batch is being read; `issued` holds those that
    DALI has and whose crops have not been taken. Closing it ends its threads.

    headers     of the images of the index; may be shared by several sources
    first       a plan with as many views and images as any of `rest`
    threads     number of threads that read
    as_list     makes DALI's list of B tensors from `as_tensor` of the bytes of each, without a copy
    """

    def __init__(
        self,
        index: ImageIndex,
        headers: JpegHeaders,
        first: BatchPlan,
        rest: Iterator[BatchPlan],
        *,
        threads: int,
        corners: bool,
        as_tensor: Callable[[bytes], Any],
        as_list: Callable[[list[Any]], Any],
    ) -> None:
        self._index, self._headers, self._plans, self._corners = index, headers, rest, corners
        self._as_tensor, self._as_list = as_tensor, as_list
        self._readers = ThreadPoolExecutor(min(READERS, threads), "read")
        self._shape = first.boxes.shape[:2]
        self._reading = self._start(first)
        self.issued: deque[DaliBatch] = deque()

    def __iter__(self) -> DaliBatches:
        return self

    def __next__(self) -> list[Any]:
        if self._reading is None:
            raise StopIteration
        batch, tasks = self._reading
        self._reading = self._start(next(self._plans, None))
        if self._index.pixels is not None:
            batch.inputs.append(self._index.pixels[batch.plan.indices])
        else:
            batch.inputs.append(self._as_list([image for task in tasks for image in task.result()]))
        if self._corners:
            views, count = batch.boxes.shape[:2]
            halves = batch.boxes.reshape(views, count, 2, 2).transpose(0, 2, 1, 3)
            batch.inputs.extend(np.ascontiguousarray(halves).reshape(2 * views, count, 2))
        self.issued.append(batch)
        return batch.inputs

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _start(self, plan: BatchPlan | None) -> tuple[DaliBatch, list[Future[list[Any]]]] | None:
        if plan is None:
            return None
        views, count = plan.boxes.shape[:2]
        assert views == self._shape[0], "plans of one iterator have the same views"
        assert count <= self._shape[1], "the first plan of an iterator is the largest"
        batch = DaliBatch(plan, plan.boxes.copy(), np.ones(count, dtype=np.uint8), [])
        starts: Sequence[int] = range(0, count, FILES_PER_TASK) if self._index.pixels is None else ()
        return batch, [self._readers.submit(self._read, batch, start) for start in starts]

    def _read(self, batch: DaliBatch, start: int) -> list[Any]:
        """Up to `FILES_PER_TASK` tensors of encoded bytes; writes orientations and the boxes that they change."""
        headers, tensors = self._headers, []
        images = batch.plan.indices[start : start + FILES_PER_TASK]
        known = zip(images.tolist(), headers.kinds[images].tolist(), headers.lengths[images].tolist(), strict=True)
        for row, (image, kind, length) in enumerate(known, start):
            data = b""
            if kind != headers.OTHER:
                try:
                    data = self._index.read_bytes(image)
                    if len(data) != length or not kind:
                        kind = headers.examine(image, data)
                except DataError:
                    if not self._index.is_encoded(image):
                        raise
                    kind = headers.OTHER  # `read` reports what is wrong with the file, or replaces the image
            if kind == headers.OTHER:
                data = _ppm(self._index.read(image))
            elif kind != 1:
                batch.orientations[row] = kind
                batch.boxes[:, row] = stored_box(batch.boxes[:, row], headers.header(image))
            tensors.append(self._as_tensor(data))
        return tensors


def _ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 → an uncompressed file, which every decoder reads exactly."""
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
